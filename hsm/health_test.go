package hsm

import (
	"context"
	"errors"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/miekg/pkcs11"
)

// eventually waits until something is so that other goroutines bring about.
func eventually(t *testing.T, what string, so func() bool) {
	t.Helper()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for end := time.Now().Add(time.Minute); !so(); <-tick.C {
		if time.Now().After(end) {
			t.Fatal("never: " + what)
		}
	}
}

// TestRecoversByItself: a device whose token comes back is well again without a
// call being made.
func TestRecoversByItself(t *testing.T) {
	tok, d := openNew(t)
	d.probeEvery = 20 * time.Millisecond
	if err := os.Rename(tok.tokens, tok.tokens+".away"); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the first may still have what the library remembers
		_ = d.Check(t.Context())
	}
	if err := d.Check(t.Context()); !errors.Is(err, ErrUnavailable) {
		t.Fatal(err)
	}
	if _, err := d.Sign(t.Context(), make([]byte, 48)); !errors.Is(err, ErrUnavailable) {
		t.Fatal(err)
	}
	if err := os.Rename(tok.tokens+".away", tok.tokens); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the device recovers", func() bool { return !d.unwell.Load() })
	useAll(t, d)
}

// TestProbesBackOff: 1 s doubling to 10 s, so that a device is found within 30 s.
func TestProbesBackOff(t *testing.T) {
	for failures, want := range []time.Duration{1, 2, 4, 8, 10, 10, 10, 10, 10} {
		if got := probeDelay(probeInterval, failures); got != want*time.Second {
			t.Errorf("after %d failures %v", failures, got)
		}
	}
}

// TestIdleSessionIsLookedAt: a session that died while it was idle is not used, even
// for a call that is never repeated.
func TestIdleSessionIsLookedAt(t *testing.T) {
	for name, kill := range map[string]func(*session) error{
		"closed":     func(s *session) error { return s.p11.CloseSession(s.h) },
		"logged out": func(s *session) error { return s.p11.Logout(s.h) },
	} {
		t.Run(name, func(t *testing.T) {
			_, d := openNew(t)
			used, err := call(t.Context(), d, callOptions{op: "test"}, func(s *session) (*session, error) { return s, nil })
			if err != nil {
				t.Fatal(err)
			}
			if err := d.mod.alone(t.Context(), func() error { return kill(used) }); err != nil {
				t.Fatal(err)
			}
			used.used = time.Now().Add(-2 * idleCheck)
			_, err = call(t.Context(), d, callOptions{op: "test", once: true}, func(s *session) (struct{}, error) {
				if s == used {
					t.Error("the dead session was used")
				}
				return struct{}{}, s.keyWorks()
			})
			if err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestIdleWorkersEnd: sessions that nobody used for long are closed, and opened anew
// when they are needed.
func TestIdleWorkersEnd(t *testing.T) {
	_, d := openNew(t)
	useAll(t, d)
	d.mu.Lock()
	for _, w := range d.idle {
		w.parked = time.Now().Add(-2 * idleClose)
	}
	d.mu.Unlock()
	d.patrol()
	eventually(t, "the workers end", func() bool {
		d.mu.Lock()
		defer d.mu.Unlock()
		return len(d.workers) == 0
	})
	useAll(t, d)
}

// TestBusySessions: a call that finds no session in time is refused and leaves none
// of its own behind; a caller that goes away leaves the queue.
func TestBusySessions(t *testing.T) {
	tok, _ := openNew(t)
	tok.cfg.MaxSessions, tok.cfg.CallTimeout = 1, 4*time.Second
	d := tok.open(t)
	entered, gate := make(chan struct{}), make(chan struct{})
	enter := sync.OnceFunc(func() { close(entered) })
	hook := func(op string) error {
		if op == "sign" {
			enter()
			<-gate
		}
		return nil
	}
	d.hook.Store(&hook)
	signed := make(chan error, 1)
	go func() {
		_, err := d.Sign(context.Background(), make([]byte, 48))
		signed <- err
	}()
	<-entered
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	released := make(chan struct{})
	_, err := call(ctx, d, callOptions{op: "test", release: func() { close(released) }}, func(*session) (int, error) {
		t.Error("it ran")
		return 0, nil
	})
	if !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Fatal(err)
	}
	<-released
	d.mu.Lock()
	n := len(d.queue)
	d.mu.Unlock()
	if n != 0 {
		t.Fatalf("%d calls still wait", n)
	}
	close(gate)
	if err := <-signed; err != nil {
		t.Fatal(err)
	}
	useAll(t, d)
}

// TestLightCallsShareAWorker: on a token that works serially, callers of light calls
// get their own results from one worker.
func TestLightCallsShareAWorker(t *testing.T) {
	_, d := openNew(t)
	d.mu.Lock()
	d.serial = true
	d.mu.Unlock()
	const callers = 32
	results := make(chan error, callers)
	sessions := make(chan pkcs11.SessionHandle, callers*50)
	for i := range callers {
		go func() {
			var err error
			for k := range 50 {
				var got int
				got, err = call(context.Background(), d, callOptions{op: "test", light: true}, func(s *session) (int, error) {
					sessions <- s.h
					return 100*i + k, nil
				})
				if err == nil && got != 100*i+k {
					err = errors.New("another caller's result")
				}
				if err != nil {
					break
				}
			}
			results <- err
		}()
	}
	for range callers {
		if err := <-results; err != nil {
			t.Fatal(err)
		}
	}
	close(sessions)
	used := map[pkcs11.SessionHandle]bool{}
	for h := range sessions {
		used[h] = true
	}
	if len(used) >= d.set.maxSessions {
		t.Errorf("%d sessions were used", len(used))
	}
}
