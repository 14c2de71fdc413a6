package keyring

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
)

// Limits bound a Cache. TTL, MaxKEKs and MaxKeys have no default.
type Limits struct {
	TTL        time.Duration // how long a KEK or a key version stays open
	MaxKEKs    int           // KEK versions open at a time
	MaxKeys    int           // key versions of protection software open at a time
	MaxHandles int           // key versions of protection hardware loaded at a time; default DefaultHandles
	Now        func() time.Time
}

// DefaultHandles is the default of Limits.MaxHandles.
const DefaultHandles = 256

// Cache keeps opened KEKs and key versions of protection software in locked
// memory, so that the device is asked once for each KEK version and TTL. Key
// versions outlive their KEK by their own TTL. It also keeps key versions of
// protection hardware loaded in the device. A value in use is never wiped or
// unloaded, so what is in use may exceed the limits while it is. All methods are
// safe for concurrent use.
type Cache struct {
	root    *Root
	keks    *store[KEKBinding, *secret.Bytes]
	keys    []*store[KeyBinding, *Material] // shards by key id, a power of two of them
	handles *store[KeyBinding, *Material]   // of protection hardware
	scrub   scrubber
}

const (
	maxShards     = 16
	keysPerShard  = 64 // at least, when there is more than one shard
	maxCachedKeys = 1 << 20
)

// NewCache returns an empty cache over the device of root. A limit that is not
// positive is kms.Invalid. A nil Now is time.Now.
func NewCache(root *Root, limits Limits) (*Cache, error) {
	if root == nil {
		return nil, kms.Errorf(kms.Invalid, "a key cache needs a root")
	}
	if limits.MaxHandles == 0 {
		limits.MaxHandles = DefaultHandles
	}
	if limits.MaxHandles < 0 || limits.MaxHandles > maxCachedKeys {
		return nil, kms.Errorf(kms.Invalid, "key cache: the maximum of loaded keys must be 1 to %d", maxCachedKeys)
	}
	if limits.TTL <= 0 || limits.MaxKEKs <= 0 || limits.MaxKeys <= 0 || max(limits.MaxKEKs, limits.MaxKeys) > maxCachedKeys {
		return nil, kms.Errorf(kms.Invalid, "key cache: the time to live and both maxima must be set, the maxima to at most %d", maxCachedKeys)
	}
	now := limits.Now
	if now == nil {
		now = time.Now
	}
	c := &Cache{root: root}
	c.keks = newStore[KEKBinding](limits.MaxKEKs, limits.TTL, now, func(kek *secret.Bytes) {
		kek.Destroy()
		c.scrub.soon()
	})
	forget := func(m *Material) {
		m.Destroy()
		c.scrub.soon()
	}
	shards := 1
	for shards < maxShards && limits.MaxKeys/(2*shards) >= keysPerShard {
		shards *= 2
	}
	for range shards {
		c.keys = append(c.keys, newStore[KeyBinding](limits.MaxKeys/shards, limits.TTL, now, forget))
	}
	// Unloading waits for the device, which may hang: nobody waits with it.
	c.handles = newStore[KeyBinding](limits.MaxHandles, limits.TTL, now, func(m *Material) { go m.Destroy() })
	return c, nil
}

// KeyRef is a key version as it is stored, and how to come to its KEK.
type KeyRef struct {
	KeyBinding
	Node       string         // this node
	Protection kms.Protection // of the keyring
	Wrapped    []byte         // WrapMaterial under the KEK version that the binding names; protection hardware: empty
}

// KEK returns the binding of the KEK copy that opens the key.
func (r *KeyRef) kek() KEKBinding {
	return KEKBinding{Cluster: r.Cluster, Keyring: r.Keyring, Version: r.KEK, Node: r.Node, Protection: r.Protection}
}

// KEK returns an opened KEK. The caller calls release exactly once, after which
// it must not touch the KEK, and never destroys it. Errors are those of
// Root.OpenKEK; ctx ending first is kms.Unavailable with its cause wrapped.
func (c *Cache) KEK(ctx context.Context, b KEKBinding, sealed []byte) (kek *secret.Bytes, release func(), err error) {
	if kek, release, ok := c.keks.hit(b); ok {
		return kek, release, nil
	}
	return c.openKEK(ctx, b, sealed)
}

func (c *Cache) openKEK(ctx context.Context, b KEKBinding, sealed []byte) (*secret.Bytes, func(), error) {
	sealed = slices.Clone(sealed) // the opening may outlive this call
	kek, release, err := c.keks.get(ctx, b, func(ctx context.Context) (*secret.Bytes, error) {
		return c.root.OpenKEK(ctx, b, sealed)
	})
	return kek, release, ended(err)
}

// Key returns an opened key version. With protection software sealed is this
// node's copy of its KEK, which is opened on the way if it is not open; with
// protection hardware it is this node's copy of the key version, which the device
// loads. The caller calls release exactly once, after which it must not touch the
// material, and never destroys it. Errors as of KEK and of Root.LoadVersion.
func (c *Cache) Key(ctx context.Context, ref KeyRef, sealed []byte) (key *Material, release func(), err error) {
	s := c.shard(&ref)
	if key, release, ok := s.hit(ref.KeyBinding); ok {
		return key, release, nil
	}
	if ref.Protection == kms.Hardware {
		return c.loadKey(ctx, ref, sealed)
	}
	return c.openKey(ctx, ref, sealed)
}

func (c *Cache) loadKey(ctx context.Context, ref KeyRef, sealed []byte) (*Material, func(), error) {
	sealed = slices.Clone(sealed) // the loading may outlive this call
	key, release, err := c.handles.get(ctx, ref.KeyBinding, func(ctx context.Context) (*Material, error) {
		return c.root.LoadVersion(ctx, ref.KeyBinding, ref.Node, sealed)
	})
	return key, release, ended(err)
}

func (c *Cache) openKey(ctx context.Context, ref KeyRef, kekSealed []byte) (*Material, func(), error) {
	ref.Wrapped, kekSealed = slices.Clone(ref.Wrapped), slices.Clone(kekSealed) // the opening may outlive this call
	key, release, err := c.shard(&ref).get(ctx, ref.KeyBinding, func(ctx context.Context) (*Material, error) {
		kek, release, err := c.KEK(ctx, ref.kek(), kekSealed)
		if err != nil {
			return nil, err
		}
		defer release()
		material, err := UnwrapMaterial(kek, ref.KeyBinding, ref.Wrapped)
		if err != nil {
			return nil, err
		}
		m, err := NewMaterial(ref.KeyBinding, material)
		if errors.Is(err, kms.Invalid) {
			return nil, kms.ErrOpen // unwrapped, and yet not a key of its algorithm
		}
		return m, err
	})
	return key, release, ended(err)
}

// ended turns the end of the caller's context into kms.Unavailable.
func ended(err error) error {
	if err == context.Canceled || err == context.DeadlineExceeded {
		return kms.Wrap(kms.Unavailable, err, "the key was not opened in time", "try again")
	}
	return err
}

func (c *Cache) shard(ref *KeyRef) *store[KeyBinding, *Material] {
	if ref.Protection == kms.Hardware {
		return c.handles
	}
	return c.memory(ref.KeyID)
}

// memory is the shard of a key of protection software.
func (c *Cache) memory(id kms.KeyID) *store[KeyBinding, *Material] {
	return c.keys[int(id[0])&(len(c.keys)-1)] // key ids are random
}

// stores calls f for every store of key versions.
func (c *Cache) stores(f func(*store[KeyBinding, *Material])) {
	for _, s := range c.keys {
		f(s)
	}
	f(c.handles)
}

// Forget drops every KEK and key version of a keyring.
func (c *Cache) Forget(keyring string) {
	c.keks.forget(func(b KEKBinding) bool { return b.Keyring == keyring })
	c.stores(func(s *store[KeyBinding, *Material]) {
		s.forget(func(b KeyBinding) bool { return b.Keyring == keyring })
	})
}

// ForgetKey drops every version of a key: for one that was destroyed.
func (c *Cache) ForgetKey(id kms.KeyID) {
	of := func(b KeyBinding) bool { return b.KeyID == id }
	c.memory(id).forget(of)
	c.handles.forget(of)
}

// Purge drops everything.
func (c *Cache) Purge() {
	c.keks.forget(func(KEKBinding) bool { return true })
	c.stores(func(s *store[KeyBinding, *Material]) { s.forget(func(KeyBinding) bool { return true }) })
}

// Sweep drops what has outlived its time. The cache does so by itself with a
// timer; with an injected clock it is this call that matters.
func (c *Cache) Sweep() {
	c.keks.sweep()
	c.stores((*store[KeyBinding, *Material]).sweep)
}

// Scrub has memory collected soon, as after an eviction: for who used key material
// that did not come from the Cache.
func (c *Cache) Scrub() { c.scrub.soon() }

// Stats are the counters of a Cache.
type Stats struct {
	KEKs, Keys   int    // open in memory now
	Handles      int    // loaded in the device now
	Hits, Misses uint64 // of all since the start
}

// Stats returns the counters.
func (c *Cache) Stats() Stats {
	var out Stats
	out.KEKs, out.Hits, out.Misses = c.keks.stats()
	c.stores(func(s *store[KeyBinding, *Material]) {
		size, hits, misses := s.stats()
		if s == c.handles {
			out.Handles = size
		} else {
			out.Keys += size
		}
		out.Hits += hits
		out.Misses += misses
	})
	return out
}
