package hsm

import (
	"context"
	"crypto/ecdh"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms/secret"
)

// memberErrors are what is wrong with each member, in one line.
type memberErrors []error

func (e memberErrors) Error() string {
	var all []string
	for _, err := range e {
		all = append(all, err.Error())
	}
	return strings.Join(all, "; ")
}

func (e memberErrors) Unwrap() []error { return e }

// order returns the members with a device in the order in which a call tries them:
// first those that work, beginning with the one that calls go to, then those that
// are down, which may have come back.
func (g *Group) order() []*member {
	var up, down []*member
	first := int(g.first.Load())
	for i := range g.members {
		m := g.members[(first+i)%len(g.members)]
		m.mu.Lock()
		if m.dev != nil {
			if m.down == nil {
				up = append(up, m)
			} else {
				down = append(down, m)
			}
		}
		m.mu.Unlock()
	}
	return append(up, down...)
}

// working returns the member that calls go to, nil when it is down.
func (g *Group) working() *member {
	m := g.members[g.first.Load()]
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.dev == nil || m.down != nil {
		return nil
	}
	return m
}

// finalError reports whether another member would fail in the same way, or the caller has left.
func finalError(ctx context.Context, err error) bool {
	return err == nil || ctx.Err() != nil || errors.Is(err, ErrInvalid) || errors.Is(err, ErrUnsupported) || errors.Is(err, context.Canceled)
}

// each runs f on one member after the other until one does not fail for a reason of
// its own.
func (g *Group) each(ctx context.Context, f func(m *member) error) error {
	if g.closed.Load() {
		return unavailablef("the device is closed")
	}
	var tried *member
	var failures []error
	if m := g.working(); m != nil { // as a rule
		err := f(m)
		if finalError(ctx, err) {
			g.late(m, err)
			return err
		}
		g.failed(m, err)
		tried, failures = m, append(failures, fmt.Errorf("member %s: %w", m.name, err))
	}
	for _, m := range g.order() {
		if m == tried {
			continue
		}
		err := f(m)
		if finalError(ctx, err) {
			if err == nil {
				g.works(m)
			}
			g.late(m, err)
			return err
		}
		g.failed(m, err)
		failures = append(failures, fmt.Errorf("member %s: %w", m.name, err))
	}
	if failures == nil {
		return unavailablef("no member of the device group is there")
	}
	return memberErrors(failures)
}

// late looks after a member on which a call ran into its own deadline: it may hang.
func (g *Group) late(m *member, err error) {
	if errors.Is(err, context.DeadlineExceeded) {
		g.failed(m, err)
	}
}

// failed leaves a member out until it works again.
func (g *Group) failed(m *member, err error) {
	if m.fail(err) {
		g.log.Warn("a member of the device group is down", "member", m.name, "err", err)
	}
}

// fail notes why a member is down and reports whether it was not before.
func (m *member) fail(err error) bool {
	m.mu.Lock()
	first := m.down == nil
	m.down = err
	m.mu.Unlock()
	select {
	case m.wake <- struct{}{}:
	default:
	}
	return first
}

// works makes calls go to a member.
func (g *Group) works(m *member) {
	for i, other := range g.members {
		if other == m {
			g.first.Store(int32(i))
		}
	}
	g.up(m)
}

func (g *Group) up(m *member) {
	m.mu.Lock()
	was := m.down
	m.down = nil
	m.mu.Unlock()
	if was != nil {
		g.log.Info("a member of the device group works again", "member", m.name)
	}
}

// tend looks after one member: it opens it when it was absent and checks it when it
// has failed, until it works.
func (g *Group) tend(ctx context.Context, m *member) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-m.wake:
		}
		for wait := groupDelay; m.isDown(); wait = min(2*wait, groupMaxDelay) {
			timer := time.NewTimer(wait)
			select {
			case <-ctx.Done():
				timer.Stop()
				return
			case <-timer.C:
			}
			err := g.restore(ctx, m)
			switch {
			case err == nil:
				g.up(m)
			case ctx.Err() != nil:
				return
			default:
				m.mu.Lock()
				m.down = err
				m.mu.Unlock()
			}
			if errors.Is(err, ErrPIN) && !m.opened() {
				g.log.Error("a member of the device group refuses the PIN; it is not tried again before a restart", "member", m.name, "err", err)
				return
			}
		}
	}
}

func (m *member) isDown() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.down != nil
}

func (m *member) opened() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.dev != nil
}

func (g *Group) restore(ctx context.Context, m *member) error {
	m.mu.Lock()
	dev := m.dev
	m.mu.Unlock()
	if dev != nil {
		return dev.Check(ctx)
	}
	return g.join(ctx, m)
}

// ask runs f on the members' devices and returns what the first one yields that does
// not fail.
func ask[T any](ctx context.Context, g *Group, f func(d Member) (T, error)) (out T, err error) {
	err = g.each(ctx, func(m *member) (err error) {
		out, err = f(m.dev)
		return err
	})
	return out, err
}

// ECDH is Device.ECDH.
func (g *Group) ECDH(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error) {
	return ask(ctx, g, func(d Member) ([]byte, error) { return d.ECDH(ctx, peer) })
}

// Sign is Device.Sign.
func (g *Group) Sign(ctx context.Context, digest []byte) ([]byte, error) {
	return ask(ctx, g, func(d Member) ([]byte, error) { return d.Sign(ctx, digest) })
}

// Wrap is Device.Wrap.
func (g *Group) Wrap(ctx context.Context, aad, key []byte) ([]byte, error) {
	return ask(ctx, g, func(d Member) ([]byte, error) { return d.Wrap(ctx, aad, key) })
}

// Unwrap is Device.Unwrap.
func (g *Group) Unwrap(ctx context.Context, aad, wrapped []byte) (*secret.Bytes, error) {
	return ask(ctx, g, func(d Member) (*secret.Bytes, error) { return d.Unwrap(ctx, aad, wrapped) })
}

// Random is Device.Random.
func (g *Group) Random(ctx context.Context, b []byte) error {
	return g.each(ctx, func(m *member) error { return m.dev.Random(ctx, b) })
}

// Rewrap is Device.Rewrap.
func (g *Group) Rewrap(ctx context.Context, blob []byte, recipient []byte) ([]byte, error) {
	return ask(ctx, g, func(d Member) ([]byte, error) { return d.Rewrap(ctx, blob, recipient) })
}

// Attributes is Device.Attributes, of one member.
func (g *Group) Attributes(ctx context.Context) ([]KeyAttributes, error) {
	return ask(ctx, g, func(d Member) ([]KeyAttributes, error) { return d.Attributes(ctx) })
}

// Check checks all members. It is nil as long as one of them works: Down and Describe
// say which do not. Where none does the error has what is wrong with each.
func (g *Group) Check(ctx context.Context) error {
	if g.closed.Load() {
		return unavailablef("the device is closed")
	}
	errs := make([]error, len(g.members))
	var wg sync.WaitGroup
	for i, m := range g.members {
		wg.Go(func() { errs[i] = g.checkMember(ctx, m) })
	}
	wg.Wait()
	for _, err := range errs {
		if err == nil {
			return nil
		}
	}
	if err := ctx.Err(); err != nil {
		return contextError("check", err)
	}
	return memberErrors(errs)
}

func (g *Group) checkMember(ctx context.Context, m *member) error {
	m.mu.Lock()
	dev, down := m.dev, m.down
	m.mu.Unlock()
	if dev == nil {
		return fmt.Errorf("member %s: %w", m.name, down)
	}
	err := dev.Check(ctx)
	switch {
	case err == nil:
		g.up(m)
		return nil
	case !errors.Is(err, context.Canceled):
		g.failed(m, err)
	}
	return fmt.Errorf("member %s: %w", m.name, err)
}
