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
	TTL     time.Duration // how long a KEK or a key version stays open
	MaxKEKs int           // KEK versions open at a time
	MaxKeys int           // key versions open at a time
	Now     func() time.Time
}

// Cache keeps opened KEKs and key versions in locked memory, so that the device
// is asked once for each KEK version and TTL. Key versions outlive their KEK by
// their own TTL. A value in use is never wiped, so what is in use may exceed
// the limits while it is. All methods are safe for concurrent use.
type Cache struct {
	root *Root
	keks *store[KEKBinding, *secret.Bytes]
	keys []*store[KeyBinding, *Material] // shards by key id, a power of two of them
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
	if limits.TTL <= 0 || limits.MaxKEKs <= 0 || limits.MaxKeys <= 0 || max(limits.MaxKEKs, limits.MaxKeys) > maxCachedKeys {
		return nil, kms.Errorf(kms.Invalid, "key cache: the time to live and both maxima must be set, the maxima to at most %d", maxCachedKeys)
	}
	now := limits.Now
	if now == nil {
		now = time.Now
	}
	c := &Cache{root: root, keks: newStore[KEKBinding](limits.MaxKEKs, limits.TTL, now, (*secret.Bytes).Destroy)}
	shards := 1
	for shards < maxShards && limits.MaxKeys/(2*shards) >= keysPerShard {
		shards *= 2
	}
	for range shards {
		c.keys = append(c.keys, newStore[KeyBinding](limits.MaxKeys/shards, limits.TTL, now, (*Material).Destroy))
	}
	return c, nil
}

// KeyRef is a key version as it is stored, and how to come to its KEK.
type KeyRef struct {
	KeyBinding
	Node       string         // this node
	Protection kms.Protection // of the keyring
	Wrapped    []byte         // WrapMaterial under the KEK version that the binding names
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

// Key returns an opened key version, opening its KEK from kekSealed on the way
// if that is not open. The caller calls release exactly once, after which it
// must not touch the material, and never destroys it. Errors as of KEK.
func (c *Cache) Key(ctx context.Context, ref KeyRef, kekSealed []byte) (key *Material, release func(), err error) {
	if key, release, ok := c.shard(ref.KeyID).hit(ref.KeyBinding); ok {
		return key, release, nil
	}
	return c.openKey(ctx, ref, kekSealed)
}

func (c *Cache) openKey(ctx context.Context, ref KeyRef, kekSealed []byte) (*Material, func(), error) {
	ref.Wrapped, kekSealed = slices.Clone(ref.Wrapped), slices.Clone(kekSealed) // the opening may outlive this call
	key, release, err := c.shard(ref.KeyID).get(ctx, ref.KeyBinding, func(ctx context.Context) (*Material, error) {
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

func (c *Cache) shard(id kms.KeyID) *store[KeyBinding, *Material] {
	return c.keys[int(id[0])&(len(c.keys)-1)] // key ids are random
}

// Forget drops every KEK and key version of a keyring.
func (c *Cache) Forget(keyring string) {
	c.keks.forget(func(b KEKBinding) bool { return b.Keyring == keyring })
	for _, s := range c.keys {
		s.forget(func(b KeyBinding) bool { return b.Keyring == keyring })
	}
}

// ForgetKey drops every version of a key: for one that was destroyed.
func (c *Cache) ForgetKey(id kms.KeyID) {
	c.shard(id).forget(func(b KeyBinding) bool { return b.KeyID == id })
}

// Purge drops everything.
func (c *Cache) Purge() {
	c.keks.forget(func(KEKBinding) bool { return true })
	for _, s := range c.keys {
		s.forget(func(KeyBinding) bool { return true })
	}
}

// Sweep drops what has outlived its time. The cache does so by itself with a
// timer; with an injected clock it is this call that matters.
func (c *Cache) Sweep() {
	c.keks.sweep()
	for _, s := range c.keys {
		s.sweep()
	}
}

// Stats are the counters of a Cache.
type Stats struct {
	KEKs, Keys   int    // open now
	Hits, Misses uint64 // of both since the start
}

// Stats returns the counters.
func (c *Cache) Stats() Stats {
	var out Stats
	out.KEKs, out.Hits, out.Misses = c.keks.stats()
	for _, s := range c.keys {
		size, hits, misses := s.stats()
		out.Keys += size
		out.Hits += hits
		out.Misses += misses
	}
	return out
}
