package hsm

import (
	"container/list"
	"context"
	"sync"

	"github.com/miekg/pkcs11"
	"golang.org/x/sync/semaphore"
)

// objects are the keys loaded into the token. A session object lives as long as
// the session that made it, and all sessions of the application can use it
// (PKCS#11 2.40 section 2.6.1). So one session, the keeper, makes them all and
// the sessions of the pool, which come and go, use them.
type objects struct {
	max int

	mu     sync.Mutex
	keeper *keeper
	recent list.List // of *object with a handle, the one used last in front
}

// keeper is a session that owns loaded objects. It is closed when it is void and
// nobody uses an object of it any more.
type keeper struct {
	loading *semaphore.Weighted // one at a time makes objects in s

	// Under objects.mu.
	s       *session // nil until the first load
	users   int      // leases and loads under way
	void    bool
	retired bool
	doomed  []pkcs11.ObjectHandle // to be destroyed by the next call
}

// object is one loaded key, or one that is loaded when it is used next.
type object struct {
	blob imported

	// Under objects.mu.
	k        *keeper // whose handle h is; nil when not loaded
	h        pkcs11.ObjectHandle
	at       *list.Element
	pins     int
	unloaded bool
}

// lease is the right to use a handle until it is given back.
type lease struct {
	k *keeper
	h pkcs11.ObjectHandle
}

var errUnloaded = invalidf("the key was unloaded: load it again")

// withObject runs f with the handle of o, loading it first where needed. It runs
// on a worker, inside the gate, with s borrowed from the pool.
func withObject[T any](d *Device, s *session, o *object, f func(pkcs11.ObjectHandle) (T, error)) (T, error) {
	l, err := d.lease(s, o)
	if err != nil {
		var zero T
		return zero, err
	}
	defer d.unlease(s, o, l)
	return f(l.h)
}

// lease pins the object, which has to be given back by unlease.
func (d *Device) lease(s *session, o *object) (lease, error) {
	b := &d.objects
	b.mu.Lock()
	if o.unloaded {
		b.mu.Unlock()
		return lease{}, errUnloaded
	}
	if k := b.keeper; k != nil && (k.void || k.s != nil && !d.current(k.s)) {
		b.retire(d, k)
	}
	if b.keeper == nil {
		b.keeper = &keeper{loading: semaphore.NewWeighted(1)}
	}
	k := b.keeper
	k.users++
	if l, ok := b.pin(o, k); ok {
		b.mu.Unlock()
		return l, nil
	}
	b.mu.Unlock()
	l, err := d.loadInto(s, k, o)
	if err != nil {
		b.mu.Lock()
		k.users--
		k.void = k.void || isLost(err)
		b.closeUnused(d, k)
		b.mu.Unlock()
	}
	return l, err
}

// pin takes a handle of the keeper that is there already. It runs under mu.
func (b *objects) pin(o *object, k *keeper) (lease, bool) {
	if o.k != k {
		return lease{}, false
	}
	o.pins++
	b.recent.MoveToFront(o.at)
	return lease{k, o.h}, true
}

// loadInto makes the object in the keeper's session, one caller at a time.
func (d *Device) loadInto(s *session, k *keeper, o *object) (lease, error) {
	b := &d.objects
	ctx, cancel := context.WithTimeout(context.Background(), d.set.timeout) // the caller has left by then
	defer cancel()
	if err := k.loading.Acquire(ctx, 1); err != nil {
		return lease{}, unavailablef("another key is still being loaded")
	}
	defer k.loading.Release(1)
	b.mu.Lock()
	if o.unloaded {
		b.mu.Unlock()
		return lease{}, errUnloaded
	}
	if l, ok := b.pin(o, k); ok {
		b.mu.Unlock()
		return l, nil
	}
	b.trim(b.max - 1)
	doomed, owner := k.take(), k.s
	b.mu.Unlock()
	s.destroy(doomed)
	if owner == nil {
		var err error
		if owner, err = d.openKeeper(); err != nil {
			return lease{}, err
		}
		b.mu.Lock()
		k.s = owner
		b.mu.Unlock()
	}
	h, err := owner.load(o.blob, *d.imports, stays)
	if err != nil {
		return lease{}, d.importError(err)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if k.retired || b.keeper != k {
		return lease{}, errLost // h goes with the session
	}
	o.k, o.h, o.pins = k, h, 1
	o.at = b.recent.PushFront(o)
	return lease{k, h}, nil
}

func (d *Device) openKeeper() (*session, error) {
	epoch := d.epoch.Load()
	s, err := d.openSession(false, true)
	if err != nil {
		return nil, d.sinceOpen(err)
	}
	s.epoch = epoch
	return s, nil
}

// unlease gives a handle back and destroys, with s, what nobody needs any more.
func (d *Device) unlease(s *session, o *object, l lease) {
	b := &d.objects
	b.mu.Lock()
	l.k.users--
	if o.k == l.k {
		o.pins--
		if o.unloaded && o.pins == 0 {
			b.forget(o)
		}
	}
	b.trim(b.max)
	doomed := l.k.take()
	b.closeUnused(d, l.k)
	b.mu.Unlock()
	s.destroy(doomed)
}

// take returns the handles to destroy, none of a retired keeper: they go with it.
func (k *keeper) take() []pkcs11.ObjectHandle {
	doomed := k.doomed
	k.doomed = nil
	if k.retired {
		return nil
	}
	return doomed
}

// destroy ends session objects. One that cannot be destroyed goes with its session.
func (s *session) destroy(handles []pkcs11.ObjectHandle) {
	for _, h := range handles {
		_ = s.p11.DestroyObject(s.h, h)
	}
}

// trim takes the objects not used for longest out until n are left. Objects in
// use stay, so there may be as many more as there are calls under way.
func (b *objects) trim(n int) {
	for e := b.recent.Back(); e != nil && b.recent.Len() > n; {
		o := e.Value.(*object)
		e = e.Prev()
		if o.pins == 0 {
			b.forget(o)
		}
	}
}

// forget takes an object out; its handle is to be destroyed.
func (b *objects) forget(o *object) {
	o.k.doomed = append(o.k.doomed, o.h)
	b.recent.Remove(o.at)
	o.k, o.at, o.pins = nil, nil, 0
}

// retire gives up a keeper and all its objects, which load again when used next.
func (b *objects) retire(d *Device, k *keeper) {
	for e := b.recent.Front(); e != nil; e = b.recent.Front() {
		o := b.recent.Remove(e).(*object)
		o.k, o.at, o.pins = nil, nil, 0
	}
	k.retired = true
	b.keeper = nil
	b.closeUnused(d, k)
}

// closeUnused closes the session of a retired keeper after its last user.
func (b *objects) closeUnused(d *Device, k *keeper) {
	if k.retired && k.users == 0 && k.s != nil {
		d.drop(k.s)
		k.s = nil
	}
}

// suspect makes the next lease use a new keeper: a call hangs, maybe in this one.
func (b *objects) suspect() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.keeper != nil {
		b.keeper.void = true
	}
}

// end closes the keeper when the device is dismantled. It runs inside the gate.
func (b *objects) end(d *Device) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.keeper != nil {
		b.retire(d, b.keeper)
	}
}

// unload makes an object unusable and destroys it, after its last use.
func (d *Device) unload(o *object) {
	b := &d.objects
	b.mu.Lock()
	first, there := !o.unloaded, o.k != nil && o.pins == 0
	o.unloaded = true
	if first && there {
		b.forget(o)
	}
	b.mu.Unlock()
	if !first || !there {
		return
	}
	// Without the device the handle waits for the next call, or goes with the keeper.
	_, _ = call(context.Background(), d, callOptions{op: "unload"}, func(s *session) (struct{}, error) {
		b.mu.Lock()
		var doomed []pkcs11.ObjectHandle
		if b.keeper != nil {
			doomed = b.keeper.take()
		}
		b.mu.Unlock()
		s.destroy(doomed)
		return struct{}{}, nil
	})
}
