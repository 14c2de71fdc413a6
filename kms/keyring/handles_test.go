package keyring

import (
	"context"
	"crypto/ecdh"
	"sync"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/test/fakedevice"
)

// tray is a device that tells of loads and unloads. An unload waits until hold is
// closed.
type tray struct {
	*fakedevice.Device
	unloaded chan struct{}
	hold     chan struct{}

	mu    sync.Mutex
	loads int
}

func (d *tray) LoadHMAC(ctx context.Context, blob []byte) (func(context.Context, []byte) ([]byte, error), func(), error) {
	mac, unload, err := d.Device.LoadHMAC(ctx, blob)
	d.mu.Lock()
	d.loads++
	d.mu.Unlock()
	return mac, func() {
		<-d.hold
		unload()
		d.unloaded <- struct{}{}
	}, err
}

func (d *tray) loaded() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.loads
}

// hardNode is a node whose cache keeps keys in the device.
type hardNode struct {
	dev   *tray
	root  *Root
	cache *Cache
	clock time.Time
}

func newHardNode(t testing.TB, handles int) *hardNode {
	t.Helper()
	dev := must[*fakedevice.Device](t)(fakedevice.New(ecdh.P256()))
	n := &hardNode{clock: time.Unix(1_700_000_000, 0), dev: &tray{Device: dev, unloaded: make(chan struct{}, 100), hold: make(chan struct{})}}
	close(n.dev.hold)
	seed := must[*secret.Bytes](t)(pqc.GenerateSeed(nil))
	defer seed.Destroy()
	n.root = must[*Root](t)(NewRoot(n.dev, pqc.MLKEM768P256, seed))
	n.cache = must[*Cache](t)(NewCache(n.root, Limits{TTL: time.Minute, MaxKEKs: 1, MaxKeys: 1, MaxHandles: handles, Now: func() time.Time { return n.clock }}))
	t.Cleanup(n.cache.Purge)
	return n
}

// key returns a key of protection hardware whose id starts with i, and its copy.
func (n *hardNode) key(t testing.TB, i byte) (KeyRef, []byte) {
	t.Helper()
	b := deviceBinding(kms.AES256GCM)
	b.KeyID[0] = i
	kind, public := n.dev.ImportKey()
	v := must[*NewVersion](t)(n.root.MakeVersion(bg, "fr-1", n.dev, importers, b, []Resident{{Recipient: recipient("fr-1", n.root), ImportKind: kind, Import: public}}))
	v.Material.Destroy()
	return KeyRef{KeyBinding: b, Node: "fr-1", Protection: kms.Hardware}, v.Copies[0].Sealed
}

func (n *hardNode) use(t testing.TB, ref KeyRef, sealed []byte) {
	t.Helper()
	m, release, err := n.cache.Key(bg, ref, sealed)
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	must[[]byte](t)(m.Encrypt(bg, nil, []byte("x")))
}

func TestHandlesAreBounded(t *testing.T) {
	n := newHardNode(t, 2)
	var refs [3]KeyRef
	var copies [3][]byte
	for i := range refs {
		refs[i], copies[i] = n.key(t, byte(i+1))
	}
	before := n.dev.loaded()
	for range 3 {
		n.use(t, refs[0], copies[0])
		n.use(t, refs[1], copies[1])
	}
	if got := n.dev.loaded() - before; got != 2 {
		t.Errorf("%d loads of two keys", got)
	}
	n.use(t, refs[2], copies[2]) // pushes the first out
	<-n.dev.unloaded
	if s := n.cache.Stats(); s.Handles != 2 || s.Keys != 0 || s.KEKs != 0 {
		t.Errorf("stats %+v", s)
	}
	n.use(t, refs[0], copies[0])
	<-n.dev.unloaded
	if got := n.dev.loaded() - before; got != 4 {
		t.Errorf("%d loads", got)
	}
}

func TestHandlesGo(t *testing.T) {
	n := newHardNode(t, 10)
	ref, sealed := n.key(t, 1)
	for what, drop := range map[string]func(){
		"Forget":    func() { n.cache.Forget(ref.Keyring) },
		"ForgetKey": func() { n.cache.ForgetKey(ref.KeyID) },
		"Purge":     n.cache.Purge,
		"time":      func() { n.clock = n.clock.Add(time.Hour); n.cache.Sweep() },
	} {
		n.use(t, ref, sealed)
		m, release, err := n.cache.Key(bg, ref, sealed)
		if err != nil {
			t.Fatal(err)
		}
		drop()
		if s := n.cache.Stats(); s.Handles != 0 {
			t.Errorf("%s: %d handles are left", what, s.Handles)
		}
		must[[]byte](t)(m.Encrypt(bg, nil, nil)) // in use: not yet unloaded
		release()
		<-n.dev.unloaded
		if _, err := m.Encrypt(bg, nil, nil); err == nil {
			t.Errorf("%s: the key works after it was unloaded", what)
		}
	}
}

// TestUnloadHangs holds that a device that hangs in an unload keeps nobody from
// the keys that are loaded.
func TestUnloadHangs(t *testing.T) {
	n := newHardNode(t, 1)
	one, oneCopy := n.key(t, 1)
	two, twoCopy := n.key(t, 2)
	n.dev.hold = make(chan struct{})
	n.use(t, one, oneCopy)
	n.use(t, two, twoCopy)
	n.use(t, two, twoCopy)
	n.cache.Purge()
	close(n.dev.hold)
	<-n.dev.unloaded
	<-n.dev.unloaded
}

func TestHandleLimits(t *testing.T) {
	r, _ := newRoot(t, pqc.MLKEM768P256)
	for _, max := range []int{-1, maxCachedKeys + 1} {
		_, err := NewCache(r, Limits{TTL: time.Minute, MaxKEKs: 1, MaxKeys: 1, MaxHandles: max})
		wantKind(t, "limit", err, kms.Invalid)
	}
}

// BenchmarkHardwareEncrypt is what a message costs this package when the device
// costs next to nothing.
func BenchmarkHardwareEncrypt(b *testing.B) {
	n := newHardNode(b, 10)
	ref, sealed := n.key(b, 1)
	plaintext := make([]byte, 1<<10)
	b.ReportAllocs()
	for b.Loop() {
		m, release, err := n.cache.Key(bg, ref, sealed)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := m.Encrypt(bg, nil, plaintext); err != nil {
			b.Fatal(err)
		}
		release()
	}
}
