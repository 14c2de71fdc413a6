package hsm

import (
	"context"
	"fmt"
	"time"
)

// Probes of an unhealthy device: the first after probeInterval, each further one
// after twice as long, never longer than longestProbe.
const (
	probeInterval = time.Second
	longestProbe  = 10 * time.Second
)

// markUnhealthy makes calls fail at once until a probe succeeds. Probes are made
// in the background, and by calls when one is due.
func (d *Device) markUnhealthy(why error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sick = why
	d.unwell.Store(true)
	d.probeAt = time.Now().Add(probeDelay(d.probeEvery, d.failures))
	d.failures = min(d.failures+1, 8)
	if !d.nursed && !d.closed {
		d.nursed = true
		d.holds++
		go d.nurse()
	}
}

// probeDelay is the time to the next probe after so many failures before this one.
func probeDelay(every time.Duration, failures int) time.Duration {
	return max(min(every<<failures, longestProbe), every)
}

// markSuspect makes the next call probe the device first.
func (d *Device) markSuspect(why string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.sick == nil {
		d.sick = unavailablef("%s", why)
		d.unwell.Store(true)
		d.probeAt = time.Time{}
	}
}

func (d *Device) markHealthy() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sick = nil
	d.unwell.Store(false)
	d.failures = 0
}

// heal returns nil for a healthy device. For an unhealthy one it probes when
// the last probe is long enough ago; calls that come meanwhile wait for it.
func (d *Device) heal(ctx context.Context) error {
	if why, due := d.health(); why == nil {
		return nil
	} else if !due {
		return waitingFor(why)
	}
	return d.probe(ctx, false)
}

// waitingFor is what a call to an unhealthy device gets.
func waitingFor(why error) error {
	return fmt.Errorf("%w; waiting for the device to recover", why)
}

func (d *Device) health() (why error, due bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.sick, !time.Now().Before(d.probeAt)
}

// nurse probes an unhealthy device until it is well or closed, so that it comes
// back without a call. One runs at a time.
func (d *Device) nurse() {
	defer d.unhold()
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		d.mu.Lock()
		if d.sick == nil || d.closed {
			d.nursed = false
			d.mu.Unlock()
			return
		}
		timer.Reset(max(time.Until(d.probeAt), shortestWatch))
		d.mu.Unlock()
		select {
		case <-d.closing:
		case <-timer.C:
			_ = d.probe(context.Background(), false) // kept in d.sick for those who call
		}
	}
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
		if why == nil {
			return nil
		} else if !due {
			return waitingFor(why)
		}
	}
	err := d.probeOnce(ctx)
	if err != nil && why != nil && ctx.Err() == nil && d.restart(ctx) == nil {
		// A token that came back is seen by some libraries (SoftHSM) only
		// after they have been initialised again.
		err = d.probeOnce(ctx)
	}
	if err != nil {
		if ctx.Err() == nil && !d.ended() {
			d.markUnhealthy(fmt.Errorf("the last health check failed: %w", err))
		}
		return err
	}
	d.markHealthy()
	return nil
}

func (d *Device) ended() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.closed
}

// Check makes the token draw random bytes and encrypt and decrypt a block under
// the wrapping key. On an unhealthy device it is the probe that ends that state.
func (d *Device) Check(ctx context.Context) error { return d.probe(ctx, true) }

func (d *Device) probeOnce(ctx context.Context) error {
	// On a new session: one that is open may work on when no other can be opened
	// (SoftHSM, whose token directory went away and came back).
	_, err := call(ctx, d, callOptions{op: "check", probe: true, fresh: true}, func(s *session) (struct{}, error) {
		if _, err := s.random(16); err != nil {
			return struct{}{}, err
		}
		return struct{}{}, s.keyWorks()
	})
	return err
}

// restart initialises the library anew.
func (d *Device) restart(ctx context.Context) error {
	if !d.hold() { // keeps the module while the goroutine is in it
		return unavailablef("the device is closed")
	}
	ctx, cancel := context.WithTimeout(ctx, d.set.timeout)
	defer cancel()
	result := make(chan error, 1)
	go func() {
		defer d.unhold()
		result <- d.restartModule(ctx)
	}()
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		return unavailablef("the library does not initialise in time")
	}
}

func (d *Device) restartModule(ctx context.Context) error {
	if err := d.mod.enter(d.set.timeout); err != nil {
		return err
	}
	gen := d.mod.gen
	d.mod.leave()
	d.flush()
	return d.mod.reinitialize(ctx, gen)
}
