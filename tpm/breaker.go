package tpm

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"syscall"
	"time"
)

// Probes of a TPM that hangs: the first after firstProbe, each further one after
// twice as long, never longer than longestProbe.
const (
	firstProbe   = time.Second
	longestProbe = 10 * time.Second
)

// breaker refuses calls to a TPM that hangs, so that not each of them waits for it
// to the deadline. A call that ends by time opens it; whatever the TPM, or the
// system in its place, answers in time closes it. It is safe for concurrent use.
type breaker struct {
	mu     sync.Mutex
	why    error              // what took too long; nil: closed
	cancel context.CancelFunc // ends the probes; not nil while it is open
	ended  bool
	probes sync.WaitGroup
}

// refusal is what a call gets while the breaker is open, and nil otherwise.
func (b *breaker) refusal(op string) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.why == nil {
		return nil
	}
	return fmt.Errorf("tpm: %s: %w: the TPM hangs (%v); calls are refused until it answers a probe", op, ErrUnavailable, b.why)
}

// note takes what came of a use of the TPM: what took too long, or nil. When that
// opens the breaker, probe is called in the background until the breaker closes
// or ends. Probes report through note as well.
func (b *breaker) note(late error, probe func(context.Context)) {
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case b.ended:
	case late == nil && b.why != nil:
		b.why = nil
		b.cancel()
		b.cancel = nil
	case late != nil:
		b.why = late
		if b.cancel == nil {
			ctx, cancel := context.WithCancel(context.Background())
			b.cancel = cancel
			b.probes.Go(func() { repeat(ctx, probe) })
		}
	}
}

// repeat probes with growing pauses until ctx ends.
func repeat(ctx context.Context, probe func(context.Context)) {
	pause := firstProbe
	timer := time.NewTimer(pause)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		probe(ctx)
		pause = min(2*pause, longestProbe)
		timer.Reset(pause)
	}
}

// end closes the breaker for good and tells the probes to end.
func (b *breaker) end() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.ended, b.why = true, nil
	if b.cancel != nil {
		b.cancel()
		b.cancel = nil
	}
}

// tooLate reports whether an error of the transport says that time was up, and not
// that nobody is there or that the connection broke. EAGAIN, which the system
// counts as time, is the full queue of connections of a software TPM that takes
// none; ETIME is the kernel driver's own limit.
func tooLate(err error) bool {
	var t interface{ Timeout() bool }
	return errors.As(err, &t) && t.Timeout() || errors.Is(err, syscall.ETIME)
}
