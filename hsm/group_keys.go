package hsm

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"slices"
	"sync"
)

// groupKey is a key that was loaded into a group: into each member when it is first
// used there.
type groupKey struct {
	g    *Group
	load func(ctx context.Context, d Member) (use groupUse, unload func(), err error) // nil: it cannot be loaded again

	mu       sync.Mutex
	at       map[*member]*groupLoad
	unloaded bool
}

type groupUse = func(ctx context.Context, input []byte) ([]byte, error)

// groupLoad is a key in one member. Whoever has busy may load.
type groupLoad struct {
	busy   chan struct{} // capacity 1
	mu     sync.Mutex
	use    groupUse
	unload func()
}

func (l *groupLoad) get() groupUse {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.use
}

func (g *Group) newKey(load func(ctx context.Context, d Member) (groupUse, func(), error)) *groupKey {
	return &groupKey{g: g, load: load, at: map[*member]*groupLoad{}}
}

// place returns the key's state in a member.
func (k *groupKey) place(m *member) (*groupLoad, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.unloaded {
		return nil, errUnloaded
	}
	l := k.at[m]
	if l == nil {
		l = &groupLoad{busy: make(chan struct{}, 1)}
		k.at[m] = l
	}
	return l, nil
}

// in returns the key's use in a member, where it loads it first if need be.
func (k *groupKey) in(ctx context.Context, m *member) (groupUse, error) {
	l, err := k.place(m)
	if err != nil {
		return nil, err
	}
	if use := l.get(); use != nil {
		return use, nil
	}
	select {
	case l.busy <- struct{}{}:
		defer func() { <-l.busy }()
	case <-ctx.Done():
		return nil, contextError("load", ctx.Err())
	}
	if use := l.get(); use != nil {
		return use, nil
	}
	if k.load == nil {
		return nil, unavailablef("the key is in the member of the group that generated it only: load it from the blob of another device")
	}
	use, unload, err := k.load(ctx, m.dev)
	if err != nil {
		return nil, err
	}
	if !k.set(l, use, unload) {
		unload()
		return nil, errUnloaded
	}
	return use, nil
}

// set files what was loaded, unless the key has been unloaded meanwhile.
func (k *groupKey) set(l *groupLoad, use groupUse, unload func()) bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.unloaded {
		return false
	}
	l.mu.Lock()
	l.use, l.unload = use, unload
	l.mu.Unlock()
	return true
}

func (k *groupKey) use(ctx context.Context, input []byte) (out []byte, err error) {
	err = k.g.each(ctx, func(m *member) error {
		use, err := k.in(ctx, m)
		if err == nil {
			out, err = use(ctx, input)
		}
		return err
	})
	return out, err
}

// unload ends the key in all members.
func (k *groupKey) unload() {
	k.mu.Lock()
	first := !k.unloaded
	k.unloaded = true
	k.mu.Unlock()
	if !first {
		return
	}
	var wg sync.WaitGroup
	for _, l := range k.at {
		l.mu.Lock()
		unload := l.unload
		l.mu.Unlock()
		if unload != nil {
			wg.Go(unload)
		}
	}
	wg.Wait()
}

// loadKey loads a key into the member that calls go to.
func (g *Group) loadKey(ctx context.Context, load func(ctx context.Context, d Member) (groupUse, func(), error)) (groupUse, func(), error) {
	k := g.newKey(load)
	err := g.each(ctx, func(m *member) error {
		_, err := k.in(ctx, m)
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	return k.use, k.unload, nil
}

// LoadHMAC is Device.LoadHMAC. The key is loaded into another member when it is
// needed there.
func (g *Group) LoadHMAC(ctx context.Context, blob []byte) (mac func(ctx context.Context, message []byte) ([]byte, error), unload func(), err error) {
	return g.loadKey(ctx, loadHMACOf(blob))
}

// LoadSigner is Device.LoadSigner. The key is loaded into another member when it is
// needed there.
func (g *Group) LoadSigner(ctx context.Context, c ecdh.Curve, blob []byte) (sign func(ctx context.Context, digest []byte) ([]byte, error), unload func(), err error) {
	return g.loadKey(ctx, loadSignerOf(c, blob))
}

func loadHMACOf(blob []byte) func(ctx context.Context, d Member) (groupUse, func(), error) {
	blob = bytes.Clone(blob)
	return func(ctx context.Context, d Member) (groupUse, func(), error) { return d.LoadHMAC(ctx, blob) }
}

func loadSignerOf(c ecdh.Curve, blob []byte) func(ctx context.Context, d Member) (groupUse, func(), error) {
	blob = bytes.Clone(blob)
	return func(ctx context.Context, d Member) (groupUse, func(), error) { return d.LoadSigner(ctx, c, blob) }
}

// Generates is Device.Generates: what every member that is there generates.
func (g *Group) Generates() (hmac, signer bool) {
	hmac, signer = true, true
	for _, m := range g.order() {
		h, s := m.dev.Generates()
		hmac, signer = hmac && h, signer && s
	}
	return hmac, signer
}

// GenerateHMAC is Device.GenerateHMAC.
func (g *Group) GenerateHMAC(ctx context.Context, recipients [][]byte) (blobs [][]byte, mac func(ctx context.Context, message []byte) ([]byte, error), unload func(), err error) {
	all, own := g.withOwn(recipients)
	var k *groupKey
	err = g.each(ctx, func(m *member) error {
		made, use, end, err := m.dev.GenerateHMAC(ctx, all)
		if err != nil {
			return err
		}
		blobs, k = made, g.newKey(nil)
		if own >= 0 {
			k.load = loadHMACOf(made[own])
		}
		return k.begin(m, use, end)
	})
	if err != nil {
		return nil, nil, nil, err
	}
	return blobs[:len(recipients):len(recipients)], k.use, k.unload, nil
}

// GenerateSigner is Device.GenerateSigner.
func (g *Group) GenerateSigner(ctx context.Context, c ecdh.Curve, recipients [][]byte) (blobs [][]byte, public *ecdsa.PublicKey, sign func(ctx context.Context, digest []byte) ([]byte, error), unload func(), err error) {
	all, own := g.withOwn(recipients)
	var k *groupKey
	err = g.each(ctx, func(m *member) error {
		made, pub, use, end, err := m.dev.GenerateSigner(ctx, c, all)
		if err != nil {
			return err
		}
		blobs, public, k = made, pub, g.newKey(nil)
		if own >= 0 {
			k.load = loadSignerOf(c, made[own])
		}
		return k.begin(m, use, end)
	})
	if err != nil {
		return nil, nil, nil, nil, err
	}
	return blobs[:len(recipients):len(recipients)], public, k.use, k.unload, nil
}

// begin files a key where it was generated.
func (k *groupKey) begin(m *member, use groupUse, unload func()) error {
	l, err := k.place(m)
	if err == nil {
		k.set(l, use, unload)
	}
	return err
}

// withOwn adds the group itself to the recipients where it is not among them, so that
// the other members can load the key. own is its index, -1 when there is no room.
func (g *Group) withOwn(recipients [][]byte) (all [][]byte, own int) {
	own = slices.IndexFunc(recipients, func(r []byte) bool { return bytes.Equal(r, g.public) })
	if own >= 0 || len(recipients) == 0 || len(recipients) >= MaxRecipients {
		return recipients, own
	}
	return append(slices.Clone(recipients), g.public), len(recipients)
}
