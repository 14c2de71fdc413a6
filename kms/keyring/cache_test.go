package keyring

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/test/fakedevice"
)

// gate is a device whose key exchange waits until it is let through.
type gate struct {
	Device
	open    chan struct{}
	waiting atomic.Int32
}

func (g *gate) ECDH(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error) {
	g.waiting.Add(1)
	defer g.waiting.Add(-1)
	select {
	case <-g.open:
		return g.Device.ECDH(ctx, peer)
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

// node is a node with one KEK and as many keys under it as a test asks for.
type node struct {
	cache  *Cache
	device *fakedevice.Device
	gate   *gate
	kek    *secret.Bytes
	sealed []byte
	clock  time.Time
}

func (n *node) now() time.Time { return n.clock }

func newNode(t testing.TB, limits Limits) *node {
	t.Helper()
	n := &node{clock: time.Unix(1_700_000_000, 0), gate: &gate{open: make(chan struct{})}}
	n.device = must[*fakedevice.Device](t)(fakedevice.New(ecdh.P256()))
	n.gate.Device = n.device
	close(n.gate.open)
	seed := must[*secret.Bytes](t)(pqc.GenerateSeed(nil))
	defer seed.Destroy()
	root := must[*Root](t)(NewRoot(n.gate, pqc.MLKEM768P256, seed))
	n.kek = newKEK(t)
	n.sealed = must[[]Sealed](t)(SealKEK([]Recipient{recipient("fr-1", root)}, testKEK, n.kek))[0].Sealed
	if limits.Now == nil {
		limits.Now = n.now
	}
	n.cache = must[*Cache](t)(NewCache(root, limits))
	t.Cleanup(n.cache.Purge)
	return n
}

// key returns a key whose id starts with i.
func (n *node) key(t testing.TB, i byte) KeyRef {
	t.Helper()
	b := bindingOf(kms.AES256GCM)
	b.KeyID[0] = i
	material, _, err := Generate(b.Algorithm, bytes.Repeat([]byte{i}, EntropySize))
	if err != nil {
		t.Fatal(err)
	}
	defer material.Destroy()
	return KeyRef{KeyBinding: b, Node: "fr-1", Protection: kms.Software, Wrapped: must[[]byte](t)(WrapMaterial(n.kek, b, material))}
}

// use opens a key, uses it and releases it.
func (n *node) use(t testing.TB, ref KeyRef) {
	t.Helper()
	m, release, err := n.cache.Key(context.Background(), ref, n.sealed)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	ct := must[[]byte](t)(m.Encrypt(bg, nil, []byte("x")))
	must[[]byte](t)(m.Decrypt(bg, nil, ct))
}

func (n *node) wantStats(t testing.TB, want Stats) {
	t.Helper()
	if got := n.cache.Stats(); got != want {
		t.Errorf("stats are %+v, want %+v", got, want)
	}
}

var roomy = Limits{TTL: time.Minute, MaxKEKs: 4, MaxKeys: 16}

func TestCacheAsksTheDeviceOnce(t *testing.T) {
	n := newNode(t, roomy)
	a, b := n.key(t, 1), n.key(t, 2)
	for range 3 {
		n.use(t, a)
		n.use(t, b)
	}
	if calls := n.device.Calls(fakedevice.OpECDH); calls != 1 {
		t.Errorf("the device was asked %d times", calls)
	}
	n.wantStats(t, Stats{KEKs: 1, Keys: 2, Hits: 4 + 1, Misses: 2 + 1})
	kek, release, err := n.cache.KEK(context.Background(), a.kek(), n.sealed)
	if err != nil || !kek.Equal(n.kek) {
		t.Fatalf("KEK: %v", err)
	}
	release()
	n.wantStats(t, Stats{KEKs: 1, Keys: 2, Hits: 6, Misses: 3})
}

func TestCacheTimeToLive(t *testing.T) {
	n := newNode(t, roomy)
	a, b := n.key(t, 1), n.key(t, 2)
	n.use(t, a)
	n.clock = n.clock.Add(40 * time.Second)
	n.use(t, b)
	n.clock = n.clock.Add(40 * time.Second)
	n.cache.Sweep() // the KEK and a are too old, b is not
	n.wantStats(t, Stats{KEKs: 0, Keys: 1, Hits: 1, Misses: 3})
	n.use(t, b)
	if calls := n.device.Calls(fakedevice.OpECDH); calls != 1 {
		t.Errorf("a key did not outlive its KEK: %d calls of the device", calls)
	}
	n.use(t, a)
	if calls := n.device.Calls(fakedevice.OpECDH); calls != 2 {
		t.Errorf("an expired KEK was used: %d calls of the device", calls)
	}
	n.clock = n.clock.Add(time.Minute) // without a sweep
	before := n.cache.Stats()
	n.use(t, a)
	if after := n.cache.Stats(); after.Misses != before.Misses+2 {
		t.Error("an expired key was used")
	}
}

// TestCacheSweepsByItself runs on the clock of synctest, which Sleep moves.
func TestCacheSweepsByItself(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, Limits{TTL: time.Minute, MaxKEKs: 4, MaxKeys: 16, Now: time.Now})
		m, release, err := n.cache.Key(t.Context(), n.key(t, 1), n.sealed)
		if err != nil {
			t.Fatal(err)
		}
		release()
		time.Sleep(30 * time.Second)
		n.use(t, n.key(t, 2))
		time.Sleep(31 * time.Second)
		synctest.Wait()
		if m.bytes.Len() != 0 {
			t.Error("an idle cache kept a key beyond its time")
		}
		if s := n.cache.Stats(); s.KEKs != 0 || s.Keys != 1 {
			t.Errorf("%d KEKs and %d keys are left", s.KEKs, s.Keys)
		}
		time.Sleep(31 * time.Second)
		synctest.Wait()
		if s := n.cache.Stats(); s.Keys != 0 {
			t.Error("the second sweep did not come")
		}
	})
}

func TestCacheEvictsTheLeastRecentlyUsed(t *testing.T) {
	n := newNode(t, Limits{TTL: time.Minute, MaxKEKs: 1, MaxKeys: 2})
	a, b, c := n.key(t, 1), n.key(t, 2), n.key(t, 3)
	n.use(t, a)
	n.use(t, b)
	n.use(t, a)
	n.use(t, c) // drops b
	before := n.cache.Stats()
	n.use(t, a)
	n.use(t, c)
	if after := n.cache.Stats(); after.Keys != 2 || after.Misses != before.Misses {
		t.Errorf("the wrong key was dropped: %+v, then %+v", before, after)
	}
	n.use(t, b)
	if after := n.cache.Stats(); after.Keys != 2 || after.Misses != before.Misses+1 {
		t.Errorf("the key that should have been dropped was not: %+v", after)
	}
}

// TestCacheNeverWipesWhatIsInUse drops a key in every way while it is used.
func TestCacheNeverWipesWhatIsInUse(t *testing.T) {
	for what, drop := range map[string]func(*node, KeyRef){
		"Purge":     func(n *node, _ KeyRef) { n.cache.Purge() },
		"Forget":    func(n *node, r KeyRef) { n.cache.Forget(r.Keyring) },
		"ForgetKey": func(n *node, r KeyRef) { n.cache.ForgetKey(r.KeyID) },
		"Sweep":     func(n *node, _ KeyRef) { n.clock = n.clock.Add(time.Hour); n.cache.Sweep() },
		"eviction":  func(n *node, _ KeyRef) { n.use(t, n.key(t, 8)); n.use(t, n.key(t, 9)) },
	} {
		n := newNode(t, Limits{TTL: time.Minute, MaxKEKs: 1, MaxKeys: 1})
		ref := n.key(t, 1)
		m, release1, err := n.cache.Key(context.Background(), ref, n.sealed)
		if err != nil {
			t.Fatal(err)
		}
		_, release2, err := n.cache.Key(context.Background(), ref, n.sealed)
		if err != nil {
			t.Fatal(err)
		}
		drop(n, ref)
		if _, err := m.Encrypt(bg, nil, nil); err != nil {
			t.Errorf("%s: a key in use was wiped: %v", what, err)
		}
		release1()
		if m.bytes.Len() == 0 {
			t.Errorf("%s: wiped before the last release", what)
		}
		release2()
		if m.bytes.Len() != 0 {
			t.Errorf("%s: not wiped after the last release", what)
		}
	}
}

func TestCacheForgets(t *testing.T) {
	n := newNode(t, roomy)
	n.use(t, n.key(t, 1))
	n.use(t, n.key(t, 2))
	n.cache.Forget("europe")
	n.cache.ForgetKey(kms.KeyID{3})
	if s := n.cache.Stats(); s.KEKs != 1 || s.Keys != 2 {
		t.Errorf("forgot too much: %+v", s)
	}
	n.cache.ForgetKey(n.key(t, 1).KeyID)
	if s := n.cache.Stats(); s.KEKs != 1 || s.Keys != 1 {
		t.Errorf("ForgetKey: %+v", s)
	}
	n.cache.Forget("coalition")
	if s := n.cache.Stats(); s.KEKs != 0 || s.Keys != 0 {
		t.Errorf("Forget: %+v", s)
	}
}

func TestCacheErrorsAreNotRemembered(t *testing.T) {
	n := newNode(t, roomy)
	ref := n.key(t, 1)
	ctx := context.Background()
	n.device.Fail(func(string) error { return errBroken })
	_, _, err := n.cache.Key(ctx, ref, n.sealed)
	wantKind(t, "a device that fails", err, kms.Unavailable)
	n.device.Fail(nil)
	_, _, err = n.cache.Key(ctx, ref, n.sealed[:len(n.sealed)-1])
	wantErrOpen(t, "a wrong copy of the KEK", err)
	bad := ref
	bad.Wrapped = bytes.Clone(ref.Wrapped)
	bad.Wrapped[20] ^= 1
	_, _, err = n.cache.Key(ctx, bad, n.sealed)
	wantErrOpen(t, "a wrong wrapped key", err)
	hard := ref
	hard.Protection = kms.Hardware
	_, _, err = n.cache.Key(ctx, hard, n.sealed)
	wantKind(t, "another protection", err, kms.Invalid)
	n.use(t, ref)
}

// TestCacheRefusesAKeyOutOfRange unwraps an EC scalar that is none.
func TestCacheRefusesAKeyOutOfRange(t *testing.T) {
	n := newNode(t, roomy)
	b := bindingOf(kms.ECDSAP256)
	zero := must[*secret.Bytes](t)(secret.New(32))
	defer zero.Destroy()
	ref := KeyRef{KeyBinding: b, Node: "fr-1", Protection: kms.Software, Wrapped: must[[]byte](t)(WrapMaterial(n.kek, b, zero))}
	_, _, err := n.cache.Key(context.Background(), ref, n.sealed)
	wantErrOpen(t, "the scalar zero", err)
}

type outcome struct {
	m       *Material
	release func()
	err     error
}

func (n *node) start(ctx context.Context, ref KeyRef) chan outcome {
	c := make(chan outcome, 1)
	go func() {
		m, release, err := n.cache.Key(ctx, ref, n.sealed)
		c <- outcome{m, release, err}
	}()
	return c
}

func TestCacheSharesOneLoad(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, roomy)
		n.gate.open = make(chan struct{})
		ref := n.key(t, 1)
		// The first one gives up; the load that it started must go on.
		ctx, cancel := context.WithCancel(t.Context())
		first := n.start(ctx, ref)
		synctest.Wait()
		var others []chan outcome
		for range 5 {
			others = append(others, n.start(t.Context(), ref))
		}
		synctest.Wait()
		cancel()
		o := <-first
		wantKind(t, "the one that gave up", o.err, kms.Unavailable)
		if !errors.Is(o.err, context.Canceled) {
			t.Errorf("the cause is lost: %v", o.err)
		}
		close(n.gate.open)
		var m *Material
		for _, c := range others {
			o := <-c
			if o.err != nil {
				t.Fatalf("one who waited on: %v", o.err)
			}
			if m != nil && o.m != m {
				t.Error("two loads of one key")
			}
			m = o.m
			defer o.release()
		}
		if calls := n.device.Calls(fakedevice.OpECDH); calls != 1 {
			t.Errorf("the device was asked %d times", calls)
		}
	})
}

func TestCacheStopsALoadThatNobodyWaitsFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, roomy)
		n.gate.open = make(chan struct{})
		ref := n.key(t, 1)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		a, b := n.start(ctx, ref), n.start(ctx, ref)
		for _, c := range []chan outcome{a, b} {
			o := <-c
			wantKind(t, "after the deadline", o.err, kms.Unavailable)
			if !errors.Is(o.err, context.DeadlineExceeded) {
				t.Errorf("the cause is lost: %v", o.err)
			}
		}
		synctest.Wait()
		if n.gate.waiting.Load() != 0 {
			t.Error("the device is still being asked for nobody")
		}
		close(n.gate.open)
		n.use(t, ref)
		done, cancel := context.WithCancel(t.Context())
		cancel()
		o := <-n.start(done, n.key(t, 2))
		wantKind(t, "with a context that has ended", o.err, kms.Unavailable)
	})
}

// TestCacheForgetsWhatIsBeingLoaded: whoever waits gets the key, but it is not
// kept, and whoever comes later loads it again.
func TestCacheForgetsWhatIsBeingLoaded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := newNode(t, roomy)
		n.gate.open = make(chan struct{})
		ref := n.key(t, 1)
		before := n.start(t.Context(), ref)
		synctest.Wait()
		n.cache.Forget(ref.Keyring)
		after := n.start(t.Context(), ref)
		synctest.Wait()
		close(n.gate.open)
		a, b := <-before, <-after
		if a.err != nil || b.err != nil {
			t.Fatal(a.err, b.err)
		}
		if a.m == b.m {
			t.Error("a load from before Forget was used after it")
		}
		if s := n.cache.Stats(); s.Keys != 1 || s.KEKs != 1 {
			t.Errorf("what was forgotten is kept: %+v", s)
		}
		a.release()
		b.release()
		if a.m.bytes.Len() != 0 || b.m.bytes.Len() == 0 {
			t.Error("the wrong one of the two was wiped")
		}
	})
}

func TestCacheReleaseTwice(t *testing.T) {
	n := newNode(t, roomy)
	_, release, err := n.cache.Key(context.Background(), n.key(t, 1), n.sealed)
	if err != nil {
		t.Fatal(err)
	}
	release()
	defer func() {
		if recover() == nil {
			t.Error("a second release went unnoticed")
		}
	}()
	release()
}

// TestCacheConcurrentUse uses few keys through a cache that is too small while
// others forget and purge them.
func TestCacheConcurrentUse(t *testing.T) {
	n := newNode(t, Limits{TTL: 2 * time.Millisecond, MaxKEKs: 1, MaxKeys: 3, Now: time.Now})
	var refs []KeyRef
	for i := range byte(6) {
		refs = append(refs, n.key(t, i+1))
	}
	var wg sync.WaitGroup
	for i := range uint64(8) {
		wg.Go(func() {
			r := rand.New(rand.NewPCG(i, 1))
			for range 150 {
				switch ref := refs[r.IntN(len(refs))]; r.IntN(12) {
				case 0:
					n.cache.Forget(ref.Keyring)
				case 1:
					n.cache.ForgetKey(ref.KeyID)
				case 2:
					ctx, cancel := context.WithTimeout(context.Background(), time.Duration(r.IntN(300))*time.Microsecond)
					if _, release, err := n.cache.Key(ctx, ref, n.sealed); err == nil {
						release()
					} else if !errors.Is(err, kms.Unavailable) {
						t.Error(err)
					}
					cancel()
				default:
					n.use(t, ref)
				}
			}
		})
	}
	wg.Wait()
	n.cache.Purge()
	if s := n.cache.Stats(); s.KEKs != 0 || s.Keys != 0 {
		t.Errorf("left after Purge: %+v", s)
	}
}

func TestCacheShards(t *testing.T) {
	for maxKeys, want := range map[int]int{1: 1, 127: 1, 128: 2, 1000: 8, 10_000: 16} {
		n := newNode(t, Limits{TTL: time.Minute, MaxKEKs: 1, MaxKeys: maxKeys})
		if got := len(n.cache.keys); got != want || got*n.cache.keys[0].max > maxKeys {
			t.Errorf("%d keys: %d shards of %d", maxKeys, got, n.cache.keys[0].max)
		}
	}
}

func TestNewCacheRefuses(t *testing.T) {
	root, _ := newRoot(t, pqc.MLKEM768P256)
	for what, l := range map[string]Limits{
		"nothing": {}, "no TTL": {MaxKEKs: 1, MaxKeys: 1}, "no KEKs": {TTL: 1, MaxKeys: 1}, "no keys": {TTL: 1, MaxKEKs: 1},
		"too many": {TTL: 1, MaxKEKs: 1, MaxKeys: maxCachedKeys + 1}, "negative": {TTL: -1, MaxKEKs: 1, MaxKeys: 1},
	} {
		_, err := NewCache(root, l)
		wantKind(t, what, err, kms.Invalid)
	}
	_, err := NewCache(nil, roomy)
	wantKind(t, "no root", err, kms.Invalid)
}

func TestCacheHitDoesNotAllocate(t *testing.T) {
	n := newNode(t, roomy)
	ref := n.key(t, 1)
	n.use(t, ref)
	ctx := context.Background()
	if a := testing.AllocsPerRun(100, func() {
		_, release, err := n.cache.Key(ctx, ref, n.sealed)
		if err != nil {
			t.Fatal(err)
		}
		release()
		_, release, err = n.cache.KEK(ctx, ref.kek(), n.sealed)
		if err != nil {
			t.Fatal(err)
		}
		release()
	}); a != 0 {
		t.Errorf("two hits make %v allocations", a)
	}
}
