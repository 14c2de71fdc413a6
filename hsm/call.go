package hsm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/conclave-kms/conclave/kms/secret"
)

// callOptions says how a call is to be made.
type callOptions struct {
	op    string
	rw    bool // on a read-write session of its own, closed afterwards
	bare  bool // on a session without the keys
	own   bool // on a session of its own, closed afterwards with all that was made in it
	fresh bool // on a new session, which the worker keeps
	light bool // a few microseconds on a token in this machine: see Device.admits
	once  bool // never repeated: the call is not idempotent
	probe bool // goes to an unhealthy device too

	release func() // runs once when f will not run any more; may be nil
}

// phase of a flight.
type phase uint8

const (
	waiting phase = iota // for a worker
	flying               // on one
	landed
)

// flight is one call on its way from its caller through the queue to a worker and
// back. Its fields are under Device.mu until it has landed.
type flight struct {
	o     callOptions
	phase phase
	since time.Time    // when it was queued
	left  bool         // nobody waits any more: the worker wipes the result
	done  chan *flight // gets one value: landed, or given up; the caller passes the news on to that flight
	next  *flight      // landed with this one
	err   error        // of the landed or given up flight

	outcome error // the worker's until the flight has landed
}

// passenger is a flight with the function and the result that it carries.
type passenger interface {
	base() *flight
	fly(*Device, *worker) // on the worker
	wipe()
}

type carrier[T any] struct {
	flight
	f     func(*session) (T, error)
	value T // the worker's until the flight has landed
}

func (c *carrier[T]) base() *flight { return &c.flight }

func (c *carrier[T]) wipe() { wipe(c.value) }

// call runs f on a worker goroutine with a session of its own. It returns when
// f does, when ctx ends or at the call deadline, whichever comes first. A call
// past its deadline is abandoned: PKCS#11 knows no way to stop it. Its session
// is lost and the device counts as unhealthy until a probe succeeds.
//
// f must not touch memory that the caller may change after call has returned.
func call[T any](ctx context.Context, d *Device, o callOptions, f func(*session) (T, error)) (T, error) {
	var zero T
	if err := d.admit(ctx, o); err != nil {
		o.released()
		return zero, err
	}
	c := &carrier[T]{flight: newFlight(o), f: f}
	if err := d.await(ctx, c); err != nil {
		return zero, err
	}
	return c.value, nil
}

func newFlight(o callOptions) flight { return flight{o: o, done: make(chan *flight, 1)} }

// await makes the flight and returns when it has landed, was given up, or ctx has ended.
func (d *Device) await(ctx context.Context, p passenger) error {
	fl := p.base()
	if err := d.enqueue(p); err != nil {
		fl.o.released()
		return err
	}
	if end := ctx.Done(); end == nil {
		(<-fl.done).tell()
	} else {
		select {
		case next := <-fl.done:
			next.tell()
		case <-end:
			if d.leave(p) {
				return contextError(fl.o.op, ctx.Err())
			}
		}
	}
	return fl.err
}

func (o callOptions) released() {
	if o.release != nil {
		o.release()
	}
}

// admit refuses a call whose context has ended and one to an unhealthy device.
func (d *Device) admit(ctx context.Context, o callOptions) error {
	if err := ctx.Err(); err != nil {
		return contextError(o.op, err)
	}
	if o.probe || !d.unwell.Load() {
		return nil
	}
	return d.heal(ctx)
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
	case generated:
		secret.Wipe(v.proof)
	}
}

// fly runs f on the worker goroutine, and once more on a new session when the
// session, login or handles turn out to be gone.
func (c *carrier[T]) fly(d *Device, w *worker) {
	v, err := attempt(d, w, c.o, c.f)
	if err != nil && isLost(err) && !c.o.once {
		v, err = attempt(d, w, c.o, c.f)
	}
	c.o.released()
	if err != nil {
		err = classify(c.o.op, err)
		if errors.Is(err, ErrUnavailable) {
			d.markSuspect(c.o.op + " failed")
		}
	}
	c.value, c.outcome = v, err
}

func attempt[T any](d *Device, w *worker, o callOptions, f func(*session) (T, error)) (v T, err error) {
	if err := d.mod.enter(d.set.timeout); err != nil {
		return v, d.sinceOpen(err)
	}
	gen := d.mod.gen
	s, err := d.take(w, o, w.since)
	if err == nil {
		s.hook = nil
		if hook := d.hook.Load(); hook != nil {
			s.hook = *hook
			err = (*hook)(o.op)
		}
		if err == nil {
			v, err = f(s)
		}
		d.give(w, s, err)
	}
	d.mod.leave()
	if err != nil && isLost(err) {
		d.flush()
		if uninitialized(err) {
			// The worker's own deadline: by then the caller has left.
			ctx, cancel := context.WithTimeout(context.Background(), d.set.timeout)
			defer cancel()
			if e := d.mod.reinitialize(ctx, gen); e != nil {
				return v, d.sinceOpen(e)
			}
		}
	}
	return v, err
}
