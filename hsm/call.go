package hsm

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms/secret"
)

// callOptions says how a call is to be made.
type callOptions struct {
	op    string
	rw    bool // on a read-write session of its own, closed afterwards
	bare  bool // on a session without the keys
	own   bool // on a session of its own, closed afterwards with all that was made in it
	once  bool // never repeated: the call is not idempotent
	probe bool // goes to an unhealthy device too

	release func() // runs once when f will not run any more; may be nil
}

// flight is one call on its worker goroutine. The worker and whoever waits for
// it agree under mu on who disposes of the result.
type flight[T any] struct {
	mu       sync.Mutex
	finished bool
	deserted bool // the caller has left: the worker wipes the result
	late     bool // past the call deadline, counted as abandoned
	overdue  chan struct{}
	done     chan struct{}
	value    T
	err      error
}

// call runs f on a worker goroutine with a session of its own. It returns when
// f does, when ctx ends or at the call deadline, whichever comes first. A call
// past its deadline is abandoned: PKCS#11 knows no way to stop it. Its session
// is lost and the device counts as unhealthy until a probe succeeds.
//
// f must not touch memory that the caller may change after call has returned.
func call[T any](ctx context.Context, d *Device, o callOptions, f func(*session) (T, error)) (T, error) {
	var zero T
	if o.release == nil {
		o.release = func() {}
	}
	if err := d.admit(ctx, o); err != nil {
		o.release()
		return zero, err
	}
	fl := &flight[T]{overdue: make(chan struct{}), done: make(chan struct{})}
	timer := time.AfterFunc(d.set.timeout, func() { fl.expire(d) })
	go func() {
		v, err := attempt(d, o, f)
		timer.Stop()
		o.release()
		fl.finish(d, v, err)
	}()
	select {
	case <-fl.done:
	case <-fl.overdue:
	case <-ctx.Done():
	}
	return fl.collect(ctx, o.op, d.set.timeout)
}

// admit lets a call in or refuses it.
func (d *Device) admit(ctx context.Context, o callOptions) error {
	if err := ctx.Err(); err != nil {
		return contextError(o.op, err)
	}
	if !o.probe {
		if err := d.heal(ctx); err != nil {
			return err
		}
	}
	return d.begin(ctx, o.op)
}

// expire runs at the call deadline.
func (fl *flight[T]) expire(d *Device) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	if fl.finished {
		return
	}
	fl.late = true
	d.abandon()
	close(fl.overdue)
}

// finish runs when the worker comes back, be it in time or not.
func (fl *flight[T]) finish(d *Device, v T, err error) {
	fl.mu.Lock()
	fl.finished = true
	if fl.deserted {
		wipe(v)
	} else {
		fl.value, fl.err = v, err
	}
	late := fl.late
	fl.mu.Unlock()
	close(fl.done)
	d.end(late)
}

// collect takes the result or leaves the worker to itself.
func (fl *flight[T]) collect(ctx context.Context, op string, timeout time.Duration) (T, error) {
	fl.mu.Lock()
	defer fl.mu.Unlock()
	if fl.finished {
		return fl.value, fl.err
	}
	fl.deserted = true
	var zero T
	if fl.late {
		return zero, unavailablef("%s: no answer within %v", op, timeout)
	}
	return zero, contextError(op, ctx.Err())
}

// contextError reports a call that its context ended: a deadline means that the
// device was too slow for it, a cancellation says nothing about the device.
func contextError(op string, err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w: %s: %w", ErrUnavailable, op, err)
	}
	return fmt.Errorf("hsm: %s: %w", op, err)
}

func wipe(v any) {
	switch v := v.(type) {
	case []byte:
		secret.Wipe(v)
	case *secret.Bytes:
		v.Destroy()
	}
}

// attempt runs f on the worker goroutine, and once more on a new session when
// the session, login or handles turn out to be gone.
func attempt[T any](d *Device, o callOptions, f func(*session) (T, error)) (T, error) {
	v, err := attemptOnce(d, o, f)
	if err != nil && isLost(err) && !o.once {
		v, err = attemptOnce(d, o, f)
	}
	err = classify(o.op, err)
	if errors.Is(err, ErrUnavailable) {
		d.markSuspect(o.op + " failed")
	}
	return v, err
}

func attemptOnce[T any](d *Device, o callOptions, f func(*session) (T, error)) (v T, err error) {
	// The worker's own deadline: by then the caller has left.
	ctx, cancel := context.WithTimeout(context.Background(), d.set.timeout)
	defer cancel()
	if err := d.mod.enter(ctx); err != nil {
		return v, err
	}
	gen := d.mod.gen
	s, err := d.take(o)
	if err == nil {
		s.hook = nil
		if hook := d.hook.Load(); hook != nil {
			s.hook = *hook
			err = (*hook)(o.op)
		}
		if err == nil {
			v, err = f(s)
		}
		d.give(s, o, err)
	}
	d.mod.leave()
	if err != nil && isLost(err) {
		d.flush()
		if uninitialized(err) {
			if e := d.mod.reinitialize(ctx, gen); e != nil {
				return v, e
			}
		}
	}
	return v, err
}
