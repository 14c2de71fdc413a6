package tpm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// moody is a link to a TPM that answers, hangs until the deadline or until it is
// released, or breaks with an error.
type moody struct {
	hangs  atomic.Bool
	broken atomic.Pointer[error]
	mu     sync.Mutex
	opened []time.Time
	goOn   chan struct{} // ends a hang in progress with an answer
}

func (l *moody) open(time.Time) error {
	l.mu.Lock()
	l.opened = append(l.opened, time.Now())
	l.mu.Unlock()
	if err := l.broken.Load(); err != nil {
		return *err
	}
	return nil
}

// since returns the times after start at which the TPM was asked.
func (l *moody) since(start time.Time) (at []time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, o := range l.opened {
		if !o.Before(start) {
			at = append(at, o.Sub(start))
		}
	}
	return at
}

func (l *moody) exchange(_ []byte, deadline time.Time) ([]byte, error) {
	if l.hangs.Load() {
		select {
		case <-time.After(time.Until(deadline)):
			return nil, os.ErrDeadlineExceeded
		case <-l.goOn:
		}
	}
	return answer(tpm2.TPMRCSuccess), nil
}

func (l *moody) release()        {}
func (l *moody) reset()          {}
func (l *moody) exclusive() bool { return false }

const moodyTimeout = 3 * time.Second

// withMoody runs a test with a device on a moody link, in time that passes only
// while all wait. What still runs after Close fails the test.
func withMoody(t *testing.T, test func(t *testing.T, d *Device, l *moody)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		l := &moody{goOn: make(chan struct{})}
		d := &Device{
			cfg: Config{CallTimeout: moodyTimeout}, auth: &auths{}, link: l, broken: true,
			turn: make(chan struct{}, 1), seenFail: make(chan uint64, 1), probe: (*conn).startup,
		}
		d.turn <- struct{}{}
		d.seenFail <- 0
		test(t, d, l)
		_ = d.Close()
	})
}

func (d *Device) asked() error { return d.run(context.Background(), "use", (*conn).startup) }

// took checks how long a use takes and that it fails as it should.
func took(t *testing.T, what string, use func() error, want time.Duration, wantErr string) {
	t.Helper()
	start := time.Now()
	err := use()
	if d := time.Since(start); d != want {
		t.Errorf("%s took %v, want %v", what, d, want)
	}
	if wantErr == "" {
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	} else if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), wantErr) {
		t.Errorf("%s: %v, want ErrUnavailable and %q", what, err, wantErr)
	}
}

const refusedBy = "the TPM hangs (i/o timeout)"

// TestBreaker: after one call that waited to its deadline all others fail at once
// and leave the TPM alone; probes come after 1 s, then twice as long each, up to 10 s;
// the first that is answered lets calls through.
func TestBreaker(t *testing.T) {
	withMoody(t, func(t *testing.T, d *Device, l *moody) {
		took(t, "a call", d.asked, 0, "")
		time.Sleep(time.Second)
		start := time.Now()
		l.hangs.Store(true)
		took(t, "the first call on a hung TPM", d.asked, moodyTimeout, "i/o timeout")
		want, at := []time.Duration{0}, time.Duration(0)
		for _, pause := range []time.Duration{1, 2, 4, 8, 10, 10} {
			at += moodyTimeout + pause*time.Second
			want = append(want, at)
			time.Sleep(pause*time.Second - 1) // just before the probe
			for range 20 {
				took(t, "a call before the probe", d.asked, 0, refusedBy)
			}
			time.Sleep(1 + moodyTimeout/2)
			took(t, "a call during the probe", d.asked, 0, refusedBy)
			time.Sleep(moodyTimeout / 2)
			synctest.Wait()
		}
		if got := l.since(start); !slices.Equal(got, want) {
			t.Errorf("the TPM was asked at %v, want %v", got, want)
		}
		l.hangs.Store(false)
		time.Sleep(longestProbe)
		synctest.Wait()
		took(t, "a call after the probe", d.asked, 0, "")
		l.hangs.Store(true) // the pauses begin anew
		took(t, "a call on a TPM that hangs again", d.asked, moodyTimeout, "i/o timeout")
		l.hangs.Store(false)
		time.Sleep(firstProbe)
		synctest.Wait()
		took(t, "a call after one second", d.asked, 0, "")
		time.Sleep(time.Second)
		start = time.Now()
		time.Sleep(time.Minute)
		if l.since(start) != nil {
			t.Error("a TPM that is well is probed")
		}
	})
}

// TestBreakerQueue: calls behind the one that hangs fail when it does.
func TestBreakerQueue(t *testing.T) {
	withMoody(t, func(t *testing.T, d *Device, l *moody) {
		l.hangs.Store(true)
		var wg sync.WaitGroup
		for range 32 {
			wg.Go(func() { took(t, "a call", d.asked, moodyTimeout, "TPM unavailable") })
		}
		wg.Wait()
	})
}

// TestBreakerCheck: Check asks a TPM that hangs at any time, and an answer lets calls
// through at once, as does that to a probe under way.
func TestBreakerCheck(t *testing.T) {
	withMoody(t, func(t *testing.T, d *Device, l *moody) {
		check := func() error { return d.Check(t.Context()) }
		l.hangs.Store(true)
		took(t, "the first call", d.asked, moodyTimeout, "i/o timeout")
		time.Sleep(firstProbe / 4)
		l.hangs.Store(false)
		took(t, "a call before anybody asked the TPM", d.asked, 0, refusedBy)
		took(t, "Check", check, 0, "")
		took(t, "a call after Check", d.asked, 0, "")
		l.hangs.Store(true)
		took(t, "Check on a hung TPM", check, moodyTimeout, "i/o timeout")
		took(t, "a call after a failed Check", d.asked, 0, refusedBy)
		time.Sleep(firstProbe + time.Millisecond)
		synctest.Wait() // the probe is under way
		l.hangs.Store(false)
		close(l.goOn)
		synctest.Wait()
		took(t, "a call after an answer to the probe", d.asked, 0, "")
	})
}

// TestBreakerStaysClosed: a TPM that is not there, or goes away, fails each call at
// once and is used by the first call after its return; after a hang too.
func TestBreakerStaysClosed(t *testing.T) {
	for _, lost := range []error{syscall.ECONNREFUSED, syscall.ENOENT, syscall.ECONNRESET, io.EOF} {
		withMoody(t, func(t *testing.T, d *Device, l *moody) {
			l.broken.Store(&lost)
			for range 3 {
				took(t, lost.Error(), d.asked, 0, lost.Error())
			}
			l.broken.Store(nil)
			took(t, "the first call after the return", d.asked, 0, "")
			l.hangs.Store(true)
			took(t, "a hang", d.asked, moodyTimeout, "i/o timeout")
			l.broken.Store(&lost)
			time.Sleep(firstProbe)
			synctest.Wait()
			took(t, lost.Error()+" after a hang", d.asked, 0, lost.Error())
			l.hangs.Store(false)
			l.broken.Store(nil)
			took(t, "the first call after the return from both", d.asked, 0, "")
		})
	}
}

// TestBreakerPutOff: a TPM that puts a command off to the deadline is one that hangs.
func TestBreakerPutOff(t *testing.T) {
	withMoody(t, func(t *testing.T, d *Device, l *moody) {
		d.link = &scripted{answers: [][]byte{answer(tpm2.TPMRCTesting)}}
		if err := d.asked(); !errors.Is(err, tpm2.TPMRCTesting) {
			t.Errorf("%v, want TPM_RC_TESTING", err)
		}
		took(t, "the next call", d.asked, 0, "put a command off")
		d.link = l
		took(t, "Check", func() error { return d.Check(t.Context()) }, 0, "")
		took(t, "a call after Check", d.asked, 0, "")
	})
}

// TestBreakerClose: Close ends the probes, in their pause and while one is under
// way; withMoody sees to it that nothing is left running.
func TestBreakerClose(t *testing.T) {
	for _, after := range []time.Duration{firstProbe / 2, firstProbe + time.Second} {
		withMoody(t, func(t *testing.T, d *Device, l *moody) {
			l.hangs.Store(true)
			took(t, "a call", d.asked, moodyTimeout, "i/o timeout")
			time.Sleep(after)
			want := max(0, firstProbe+moodyTimeout-after)
			if after < firstProbe {
				want = 0
			}
			took(t, "Close", d.Close, want, refusedBy)
			took(t, "the second Close", d.Close, 0, "")
			took(t, "a call after Close", d.asked, 0, "closed")
			took(t, "Check after Close", func() error { return d.Check(t.Context()) }, 0, "closed")
		})
	}
	withMoody(t, func(t *testing.T, d *Device, l *moody) { // Close meets the hang itself
		l.hangs.Store(true)
		took(t, "Close", d.Close, moodyTimeout, "i/o timeout")
	})
}

func TestTooLate(t *testing.T) {
	for _, c := range []struct {
		err  error
		want bool
	}{
		{os.ErrDeadlineExceeded, true},
		{&net.OpError{Op: "read", Err: os.ErrDeadlineExceeded}, true},
		{&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.EAGAIN)}, true},
		{&os.PathError{Op: "write", Err: syscall.ETIME}, true},
		{fmt.Errorf("wrapped: %w", syscall.ETIMEDOUT), true},
		{&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}, false},
		{&net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ENOENT)}, false},
		{&os.PathError{Op: "open", Err: syscall.EBUSY}, false},
		{&os.PathError{Op: "open", Err: syscall.EACCES}, false},
		{io.EOF, false}, {io.ErrUnexpectedEOF, false}, {net.ErrClosed, false}, {syscall.ECONNRESET, false},
	} {
		if got := tooLate(c.err); got != c.want {
			t.Errorf("%v: %v, want %v", c.err, got, c.want)
		}
	}
}
