package child

import (
	"context"
	"errors"
	"time"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms/secret"
)

const (
	maxDelay = 10 * time.Second // between two starts
	pinEvery = time.Second      // between two looks at the file of a refused PIN
)

// delay before a start after so many in a row that failed, or answered nothing: none,
// 1 s, 2 s, and so on to maxDelay.
func delay(failures int) time.Duration {
	if failures == 0 {
		return 0
	}
	return min(time.Second<<min(failures-1, 10), maxDelay)
}

// supervise starts the process again whenever it ends, until ctx does.
func (d *Device) supervise(ctx context.Context, g *generation) {
	failures := 0
	for {
		select {
		case <-ctx.Done():
			return
		case <-d.trouble:
			if !d.newPIN() {
				continue
			}
			g.kill("it was ended because the PIN has changed")
			<-g.ended
		case <-g.ended:
		}
		if ctx.Err() != nil {
			return
		}
		if g.useful.Load() {
			failures = 0
		}
		cause := g.cause()
		d.log.Warn("the PKCS#11 process is started again", "err", cause)
		if !d.set(current{err: cause}) {
			return
		}
		if g = d.revive(ctx, &failures); g == nil {
			return
		}
		d.log.Info("the PKCS#11 process is ready again", "pid", g.p.cmd.Process.Pid)
	}
}

// revive starts the process until it works. It returns nil when ctx ends.
func (d *Device) revive(ctx context.Context, failures *int) *generation {
	for {
		if !sleep(ctx, delay(*failures)) {
			return nil
		}
		*failures++
		g, id, err := d.launch(ctx)
		if err == nil && !id.same(d.id) {
			g.kill("its token has other keys")
			<-g.ended
			err = unavailablef("the PKCS#11 process was started again and found other keys in the token than before: put the token back")
		}
		if err == nil && d.set(current{g: g}) {
			return g
		}
		if err == nil { // closed meanwhile
			g.p.hangUp()
			<-g.ended
			return nil
		}
		if ctx.Err() != nil {
			return nil
		}
		d.log.Warn("the PKCS#11 process does not start", "err", err)
		d.set(current{err: sinceOpen(err)})
		if errors.Is(err, hsm.ErrPIN) {
			for !d.newPIN() {
				if !sleep(ctx, pinEvery) {
					return nil
				}
			}
			*failures = 0
		}
	}
}

// sinceOpen turns an error that says that something is not there into
// hsm.ErrUnavailable: it was there before. The PIN stays what it is.
func sinceOpen(err error) error {
	if errors.Is(err, hsm.ErrUnavailable) || errors.Is(err, hsm.ErrPIN) {
		return err
	}
	return unavailablef("the PKCS#11 process does not start: %v", err)
}

// newPIN reads the PIN anew where it comes from a file, after the token has refused
// it. It reports whether there is one that was not refused yet; none is sent twice.
func (d *Device) newPIN() bool {
	if !d.pinFile {
		return false
	}
	held, err := d.config.Hold()
	if err != nil {
		return false // not there, or empty: somebody is writing it
	}
	for _, p := range append([]*secret.Bytes{d.pin}, d.refused...) {
		if p.Equal(held.PIN) {
			held.PIN.Destroy()
			return false
		}
	}
	d.refused = append(d.refused, d.pin)
	d.pin = held.PIN
	return true
}

// sleep reports whether ctx is still good after it.
func sleep(ctx context.Context, t time.Duration) bool {
	if t == 0 {
		return ctx.Err() == nil
	}
	timer := time.NewTimer(t)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}
