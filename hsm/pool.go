package hsm

import (
	"context"
	"errors"
	"time"

	"github.com/miekg/pkcs11"
)

func uninitialized(err error) bool { return isRV(err, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED) }

// begin admits a call: it counts it in and waits for one of the session slots.
func (d *Device) begin(ctx context.Context, op string) error {
	wait, cancel := context.WithTimeout(ctx, d.set.timeout)
	defer cancel()
	if err := d.slots.Acquire(wait, 1); err != nil {
		if ctx.Err() != nil {
			return contextError(op, ctx.Err())
		}
		return unavailablef("%s: all %d sessions are busy", op, d.set.maxSessions)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var err error
	switch {
	case d.closed:
		err = unavailablef("%s: the device is closed", op)
	case d.abandoned >= d.set.maxSessions:
		err = unavailablef("%s: %d calls hang in the device; no more until one returns", op, d.abandoned)
	}
	if err != nil {
		d.slots.Release(1)
		return err
	}
	d.active++
	return nil
}

// abandon gives the slot of a call past its deadline to others.
func (d *Device) abandon() {
	d.mod.abandoned.Add(1)
	d.mu.Lock()
	d.abandoned++
	d.mu.Unlock()
	d.objects.suspect()
	d.slots.Release(1) // after counting, so that the bound holds
	d.markUnhealthy("a call got no answer in time")
}

// end counts a call out. The last one after Close takes the device down.
func (d *Device) end(late bool) {
	d.mu.Lock()
	if late {
		d.mod.abandoned.Add(-1)
		d.abandoned--
	} else {
		d.slots.Release(1)
	}
	d.active--
	last := d.closed && d.active == 0
	d.mu.Unlock()
	if last {
		d.dismantle()
	}
}

// take returns a session: an idle one of the present generation, or a new one.
// It runs inside the gate.
func (d *Device) take(o callOptions) (*session, error) {
	if !o.rw && !o.bare && !o.own {
		for s := d.popIdle(); s != nil; s = d.popIdle() {
			if d.current(s) {
				return s, nil
			}
			d.drop(s)
		}
	}
	d.mu.Lock()
	epoch := d.epoch
	d.mu.Unlock()
	s, err := d.openSession(o.rw, !o.bare)
	if err != nil {
		return nil, d.sinceOpen(err)
	}
	s.epoch = epoch
	return s, nil
}

// sinceOpen turns an error that says that token or keys are not there into
// ErrUnavailable once the device was open: then they were there before.
func (d *Device) sinceOpen(err error) error {
	if d.agreement == nil || !(errors.Is(err, ErrTokenNotFound) || errors.Is(err, ErrNotProvisioned) || errors.Is(err, ErrUnsafeToken)) {
		return err
	}
	return unavailablef("the token or its keys have gone: %v", err)
}

func (d *Device) popIdle() *session {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := len(d.idle)
	if n == 0 {
		return nil
	}
	s := d.idle[n-1]
	d.idle = d.idle[:n-1]
	return s
}

func (d *Device) current(s *session) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return s.gen == d.mod.gen && s.epoch == d.epoch
}

// drop closes a session unless its handle belongs to an earlier initialisation
// of the library: the number may be somebody else's session now.
func (d *Device) drop(s *session) {
	if s.gen == d.mod.gen {
		s.close()
	}
}

// give takes a session back. After any error it is closed: an operation may
// still be active in it. It runs inside the gate.
func (d *Device) give(s *session, o callOptions, err error) {
	d.mu.Lock()
	keep := err == nil && !o.rw && !o.bare && !o.own && !d.closed && s.epoch == d.epoch &&
		len(d.idle) < d.set.maxSessions
	if keep {
		d.idle = append(d.idle, s)
	}
	d.mu.Unlock()
	if !keep {
		d.drop(s)
	}
}

// flush voids all sessions that are open now: when one is lost, so are they.
func (d *Device) flush() {
	d.mu.Lock()
	d.epoch++
	d.mu.Unlock()
}

// markUnhealthy makes calls fail at once until a probe succeeds.
func (d *Device) markUnhealthy(why string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sick = why
	d.probeAt = time.Now().Add(d.probeEvery)
}

// markSuspect makes the next call probe the device first.
func (d *Device) markSuspect(why string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.sick == "" {
		d.sick = why
		d.probeAt = time.Time{}
	}
}

// heal returns nil for a healthy device. For an unhealthy one it probes when
// the last probe is long enough ago; calls that come meanwhile wait for it.
func (d *Device) heal(ctx context.Context) error {
	if why, due := d.health(); why == "" {
		return nil
	} else if !due {
		return unavailablef("%s; waiting for the device to recover", why)
	}
	return d.probe(ctx, false)
}

func (d *Device) health() (why string, due bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.sick, !time.Now().Before(d.probeAt)
}

// probe makes a health check, one at a time. always makes it even when another
// caller has just made one or the device is healthy.
func (d *Device) probe(ctx context.Context, always bool) error {
	wait, cancel := context.WithTimeout(ctx, d.set.timeout)
	defer cancel()
	if err := d.probing.Acquire(wait, 1); err != nil {
		if ctx.Err() != nil {
			return contextError("check", ctx.Err())
		}
		return unavailablef("check: a probe is still running")
	}
	defer d.probing.Release(1)
	why, due := d.health()
	if !always {
		if why == "" {
			return nil
		} else if !due {
			return unavailablef("%s; waiting for the device to recover", why)
		}
	}
	err := d.probeOnce(ctx)
	if err != nil && why != "" && ctx.Err() == nil && d.restart(ctx) == nil {
		// A token that came back is seen by some libraries (SoftHSM) only
		// after they have been initialised again.
		err = d.probeOnce(ctx)
	}
	if err != nil {
		if ctx.Err() == nil {
			d.markUnhealthy("the last health check failed")
		}
		return err
	}
	d.mu.Lock()
	d.sick = ""
	d.mu.Unlock()
	return nil
}

// restart initialises the library anew.
func (d *Device) restart(ctx context.Context) error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return unavailablef("the device is closed")
	}
	d.active++ // keeps the module while the worker is in it
	d.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, d.set.timeout)
	defer cancel()
	result := make(chan error, 1)
	go func() {
		err := d.restartModule(ctx)
		result <- err
		d.mu.Lock()
		d.active--
		last := d.closed && d.active == 0
		d.mu.Unlock()
		if last {
			d.dismantle()
		}
	}()
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		return unavailablef("the library does not initialise in time")
	}
}

func (d *Device) restartModule(ctx context.Context) error {
	if err := d.mod.enter(ctx); err != nil {
		return err
	}
	gen := d.mod.gen
	d.mod.leave()
	d.flush()
	return d.mod.reinitialize(ctx, gen)
}
