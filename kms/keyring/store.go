package keyring

import (
	"context"
	"sync"
	"time"
)

// store is a bounded cache of values that must be destroyed, and only when
// nobody uses them: least recently used goes first, everything goes after its
// time to live, a value in use lives on until its last release. Concurrent
// misses of one key share one load.
type store[K comparable, V any] struct {
	max     int
	ttl     time.Duration
	now     func() time.Time
	destroy func(V)

	mu      sync.Mutex
	entries map[K]*entry[K, V]
	recent  entry[K, V] // ring: recent.next was used last, recent.prev longest ago
	loads   map[K]*load[K, V]
	timer   *time.Timer // runs while there are entries
	hits    uint64
	misses  uint64
}

// entry is a value in the store, or one taken out of it that is still in use.
type entry[K comparable, V any] struct {
	key        K
	value      V
	expires    time.Time
	refs       int  // users
	out        bool // no longer in the store
	release    func()
	prev, next *entry[K, V]
}

// load is one opening of a value that any number of callers wait for.
type load[K comparable, V any] struct {
	done    chan struct{} // closed when result or err is set
	waiters int
	cancel  context.CancelFunc // called when the last waiter leaves
	forget  bool               // the result must not be kept
	result  *entry[K, V]
	err     error
}

func newStore[K comparable, V any](max int, ttl time.Duration, now func() time.Time, destroy func(V)) *store[K, V] {
	s := &store[K, V]{max: max, ttl: ttl, now: now, destroy: destroy,
		entries: map[K]*entry[K, V]{}, loads: map[K]*load[K, V]{}}
	s.recent.next, s.recent.prev = &s.recent, &s.recent
	return s
}

// hit returns the value of k if the store has it. The caller calls release
// exactly once.
func (s *store[K, V]) hit(k K) (v V, release func(), ok bool) {
	now := s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[k]
	if e == nil {
		return v, nil, false
	}
	if !now.Before(e.expires) {
		s.takeOut(e)
		return v, nil, false
	}
	s.hits++
	e.refs++
	s.unlink(e)
	s.pushFront(e)
	return e.value, e.release, true
}

// get returns the value of k, opening it with open if it is not there. open
// runs in a goroutine of its own, with a context that ends when no caller waits
// any more; an error goes to all who wait and is not remembered.
func (s *store[K, V]) get(ctx context.Context, k K, open func(context.Context) (V, error)) (v V, release func(), err error) {
	if v, release, ok := s.hit(k); ok {
		return v, release, nil
	}
	if err := ctx.Err(); err != nil {
		return v, nil, err
	}
	l := s.join(ctx, k, open)
	select {
	case <-l.done:
	case <-ctx.Done():
		if !s.leave(k, l) {
			return v, nil, ctx.Err()
		}
	}
	if l.err != nil {
		return v, nil, l.err
	}
	return l.result.value, l.result.release, nil
}

// join makes the caller a waiter of the load of k, which it starts if need be.
func (s *store[K, V]) join(ctx context.Context, k K, open func(context.Context) (V, error)) *load[K, V] {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.misses++
	if l := s.loads[k]; l != nil {
		l.waiters++
		return l
	}
	l := &load[K, V]{done: make(chan struct{}), waiters: 1}
	if e := s.entries[k]; e != nil { // another caller's load ended since hit looked
		e.refs++
		l.result = e
		close(l.done)
		return l
	}
	// The load outlives the caller that started it as long as others wait.
	loadCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	l.cancel = cancel
	s.loads[k] = l
	go func() {
		v, err := open(loadCtx)
		cancel()
		s.finish(k, l, v, err)
	}()
	return l
}

// leave takes a waiter off. It reports true when the load has ended meanwhile:
// the waiter then has its result, with a reference if there is a value.
func (s *store[K, V]) leave(k K, l *load[K, V]) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	select {
	case <-l.done:
		return true
	default:
	}
	l.waiters--
	if l.waiters == 0 {
		l.cancel()
		if s.loads[k] == l {
			delete(s.loads, k) // whoever comes now starts afresh
		}
	}
	return false
}

// finish hands the value to all who wait, a reference each.
func (s *store[K, V]) finish(k K, l *load[K, V], v V, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	defer close(l.done)
	if s.loads[k] == l {
		delete(s.loads, k)
	}
	if err != nil {
		l.err = err
		return
	}
	if l.waiters == 0 {
		s.destroy(v)
		return
	}
	e := &entry[K, V]{key: k, value: v, expires: s.now().Add(s.ttl), refs: l.waiters}
	e.release = func() { s.releaseEntry(e) }
	l.result = e
	if l.forget {
		e.out = true
		return
	}
	if old := s.entries[k]; old != nil {
		s.takeOut(old)
	}
	for len(s.entries) >= s.max {
		s.takeOut(s.recent.prev)
	}
	s.entries[k] = e
	s.pushFront(e)
	if s.timer == nil {
		s.timer = time.AfterFunc(s.ttl, s.sweep)
	}
}

func (s *store[K, V]) releaseEntry(e *entry[K, V]) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e.refs == 0 {
		panic("keyring: a handle was released more often than it was taken")
	}
	e.refs--
	if e.refs == 0 && e.out {
		s.destroy(e.value)
	}
}

// takeOut removes an entry; its value is destroyed now or at its last release.
func (s *store[K, V]) takeOut(e *entry[K, V]) {
	delete(s.entries, e.key)
	s.unlink(e)
	e.out = true
	if e.refs == 0 {
		s.destroy(e.value)
	}
}

// forget removes every entry that match selects and keeps no load under way
// that it selects.
func (s *store[K, V]) forget(match func(K) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k, e := range s.entries {
		if match(k) {
			s.takeOut(e)
		}
	}
	for k, l := range s.loads {
		if match(k) {
			l.forget = true
			delete(s.loads, k)
		}
	}
	s.stopIfEmpty()
}

// sweep removes what has outlived its time, and runs again while entries are
// left.
func (s *store[K, V]) sweep() {
	now := s.now()
	s.mu.Lock()
	defer s.mu.Unlock()
	next := s.ttl
	for _, e := range s.entries {
		if !now.Before(e.expires) {
			s.takeOut(e)
		} else {
			next = min(next, e.expires.Sub(now))
		}
	}
	s.stopIfEmpty()
	if s.timer != nil {
		s.timer.Reset(max(next, time.Second))
	}
}

func (s *store[K, V]) stopIfEmpty() {
	if len(s.entries) == 0 && s.timer != nil {
		s.timer.Stop()
		s.timer = nil
	}
}

func (s *store[K, V]) stats() (size int, hits, misses uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.entries), s.hits, s.misses
}

func (s *store[K, V]) unlink(e *entry[K, V]) { e.prev.next, e.next.prev = e.next, e.prev }

func (s *store[K, V]) pushFront(e *entry[K, V]) {
	e.prev, e.next = &s.recent, s.recent.next
	e.prev.next, e.next.prev = e, e
}
