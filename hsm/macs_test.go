package hsm

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"errors"
	"fmt"
	"testing"
	"time"
)

// macRun queues MACs behind one that is held up, so that they are made together.
type macRun struct {
	d       *Device
	flights int // calls of the hook for "hmac", the one held up included
}

type macResult struct {
	key     byte
	message []byte
	mac     []byte
	err     error
}

// start makes the device hold up its first MAC, and calls then before each later call
// into the library for MACs. A single worker makes them all.
func (r *macRun) start(then func(flight int)) (release func()) {
	r.d.mu.Lock()
	r.d.serial = true
	r.d.mu.Unlock()
	r.d.set.maxSessions = 1
	gate := make(chan struct{})
	hook := func(op string) error {
		if op == "hmac" {
			r.flights++
			if r.flights == 1 {
				<-gate
			} else {
				then(r.flights)
			}
		}
		return nil
	}
	r.d.hook.Store(&hook)
	return func() { close(gate) }
}

func (r *macRun) waiting(t *testing.T, n int) {
	t.Helper()
	eventually(t, fmt.Sprintf("%d calls wait", n), func() bool {
		r.d.mu.Lock()
		defer r.d.mu.Unlock()
		return len(r.d.queue) == n
	})
}

func macKey(k byte) []byte { return bytes.Repeat([]byte{k}, HMACKey) }

func (r *macResult) check(t *testing.T) {
	t.Helper()
	h := hmac.New(sha256.New, macKey(r.key))
	h.Write(r.message)
	if r.err != nil || !bytes.Equal(r.mac, h.Sum(nil)) {
		t.Errorf("key %d, a message of %d bytes: another MAC than the standard library's, or an error: %v", r.key, len(r.message), r.err)
	}
}

// TestMACsTogether: what is made in one call into the library comes out as if it had
// been made alone, also when the sessions are lost before or a key of the lot has gone.
func TestMACsTogether(t *testing.T) {
	const calls = 30
	for name, lose := range map[string]bool{"undisturbed": false, "sessions lost": true} {
		t.Run(name, func(t *testing.T) {
			_, d := openNew(t)
			var macs [3]func(context.Context, []byte) ([]byte, error)
			var unloads [3]func()
			for k := range macs {
				var err error
				if macs[k], unloads[k], err = d.LoadHMAC(t.Context(), wrapFor(t, d, macKey(byte(k)))); err != nil {
					t.Fatal(err)
				}
			}
			r := &macRun{d: d}
			release := r.start(func(flight int) {
				if lose && flight == 2 { // alone in the library: there is one worker
					if err := d.mod.p11.CloseAllSessions(d.workers[0].s.slot); err != nil {
						t.Error(err)
					}
				}
			})
			results := make(chan macResult, calls)
			for i := range calls {
				go func() {
					m := macResult{key: byte(i % 3), message: bytes.Repeat([]byte{byte(i)}, i*70%(lightMAC+1))}
					m.mac, m.err = macs[m.key](t.Context(), m.message)
					results <- m
				}()
				r.waiting(t, i) // the first is held up
			}
			ended := make(chan struct{})
			go func() {
				defer close(ended)
				unloads[2]()
			}()
			r.waiting(t, calls)
			release()
			gone := 0
			for range calls {
				m := <-results
				if m.key == 2 && errors.Is(m.err, ErrInvalid) {
					gone++
					continue
				}
				m.check(t)
			}
			<-ended
			if gone != calls/3 {
				t.Errorf("%d MACs with an unloaded key were refused, want %d", gone, calls/3)
			}
			if !lose && r.flights >= calls {
				t.Errorf("%d calls into the library for %d MACs", r.flights, calls)
			}
			d.hook.Store(nil)
			unloads[0]()
			unloads[1]()
			useAll(t, d)
			if n := d.sessionObjects(t); n != 0 {
				t.Errorf("%d objects are left in the token", n)
			}
		})
	}
}

// TestMACsTogetherHang: all callers of a lot that hangs are told at the deadline.
func TestMACsTogetherHang(t *testing.T) {
	const calls = 9
	_, d := openNew(t)
	mac, unload, err := d.LoadHMAC(t.Context(), wrapFor(t, d, macKey(7)))
	if err != nil {
		t.Fatal(err)
	}
	r := &macRun{d: d}
	hung := make(chan struct{})
	release := r.start(func(int) { <-hung })
	d.set.timeout, d.probeEvery = 2*time.Second, time.Hour
	results := make(chan error, calls)
	for i := range calls {
		go func() {
			_, err := mac(context.Background(), []byte("m"))
			results <- err
		}()
		r.waiting(t, i)
	}
	release()
	fine := 0
	for range calls {
		switch err := <-results; {
		case err == nil:
			fine++
		case !errors.Is(err, ErrUnavailable):
			t.Error(err)
		}
	}
	if fine > 1 {
		t.Errorf("%d MACs were made by a library that hangs", fine)
	}
	close(hung)
	d.hook.Store(nil)
	eventually(t, "the hung call is back", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return d.abandoned == 0
	})
	if err := d.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := mac(t.Context(), []byte("m")); err != nil {
		t.Error(err)
	} else {
		(&macResult{key: 7, message: []byte("m"), mac: got}).check(t)
	}
	unload()
}
