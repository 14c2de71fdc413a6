package child

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms/secret"
)

// link is the parent's end of the connection to one child process: as many slots as
// the child has workers, so that a request that was sent is being worked on and the
// time until its answer says something about the library.
type link struct {
	conn  *os.File
	w     *writer
	slots []*slot
	free  chan *slot
	gone  chan struct{} // closed when dead is set

	limit    time.Duration    // for an answer
	hopeless func(why string) // nothing but another process helps; called once
	note     func(err error)  // sees every error that the child reports
	base     time.Time        // for slot.started
	wg       sync.WaitGroup   // receiver and watchdog
	stop     chan struct{}    // ends the watchdog

	useful    atomic.Bool   // a call was answered
	sickLimit time.Duration // the constant, but in tests
	sick      atomic.Int64  // since base: the first failure of the device after its last success; 0: none

	mu    sync.Mutex
	seq   uint64
	users int // calls and receiver that still touch the memory
	dead  error
	given bool // hopeless was called
}

// slot is room for one call under way.
type slot struct {
	index int
	buf   *secret.Bytes // for the reply
	done  chan error    // capacity 1, one error for each call: nil when the reply is in frame

	// Under link.mu.
	id      uint64
	op      op
	state   slotState
	started time.Duration
	limit   time.Duration
	large   *secret.Bytes // for a reply that buf has no room for
	frame   []byte
}

type slotState byte

const (
	slotFree slotState = iota
	slotWaiting
	slotOverdue  // the caller has been told so, the reply may still come
	slotDeserted // the caller has left; the slot is free again when the reply comes
	slotDone
)

const (
	slotBuffer = 1 << 10
	indexBits  = 16 // of an id
)

// newLink takes conn, a non-blocking stream, over.
func newLink(conn *os.File, slots int, limit time.Duration) (*link, error) {
	l := &link{conn: conn, limit: limit, free: make(chan *slot, slots), gone: make(chan struct{}), stop: make(chan struct{}),
		base: time.Now(), users: 1, hopeless: func(string) {}, sickLimit: sickLimit, note: func(error) {}}
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, unavailablef("%v", err)
	}
	l.w, err = newWriter(func(b []byte) ([]byte, error) { return tryWrite(raw, b) },
		func(b []byte) error { _, err := conn.Write(b); return err },
		func() bool { return len(l.free) < slots-1 })
	if err != nil {
		return nil, err
	}
	for i := range slots {
		buf, err := secret.New(slotBuffer)
		if err != nil {
			l.destroy()
			return nil, unavailablef("%v", err)
		}
		s := &slot{index: i, buf: buf, done: make(chan error, 1)}
		l.slots = append(l.slots, s)
		l.free <- s
	}
	return l, nil
}

// start begins to receive and to watch. lost is called once, when the connection ends.
func (l *link) start(lost func(err error)) error {
	r, err := newReader(l.conn)
	if err != nil {
		return err
	}
	l.wg.Go(func() {
		err := l.receive(r)
		r.end()
		lost(err)
	})
	l.wg.Go(l.watch)
	return nil
}

// receive hands replies to their callers until the connection ends.
func (l *link) receive(r *reader) error {
	for {
		frame, err := r.next()
		if err == nil {
			err = l.deliver(frame)
		}
		if err != nil {
			return err
		}
	}
}

// deliver copies a reply into the slot of its request and wakes the caller.
func (l *link) deliver(frame []byte) error {
	id := frameID(frame)
	index := int(id & (1<<indexBits - 1))
	if index >= len(l.slots) {
		return errFrame
	}
	s := l.slots[index]
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case s.id != id:
		return errFrame
	case s.state == slotDeserted:
		l.put(s)
		return nil
	case s.state == slotOverdue:
		s.state = slotDone
		return nil
	case s.state != slotWaiting:
		return errFrame
	}
	room := s.buf.Reveal()
	if len(frame) > len(room) {
		var err error
		if s.large, err = secret.New(len(frame)); err != nil {
			s.state = slotDone
			s.done <- unavailablef("%v", err)
			return nil
		}
		room = s.large.Reveal()
	}
	s.frame = room[:copy(room, frame)]
	s.state = slotDone
	s.done <- nil
	return nil
}

// acquire waits for a free slot.
func (l *link) acquire(ctx context.Context, o op) (*slot, error) {
	select {
	case s := <-l.free:
		return s, nil
	default:
	}
	timer := time.NewTimer(l.limit)
	defer timer.Stop()
	select {
	case s := <-l.free:
		return s, nil
	case <-l.gone:
		return nil, l.cause()
	case <-timer.C:
		return nil, unavailablef("%s: all %d sessions are busy", opNames[o], len(l.slots))
	case <-ctx.Done():
		return nil, contextError(opNames[o], ctx.Err())
	}
}

// call makes a request and passes the reply to take, which must not keep what it is
// given: it is wiped afterwards. Without an answer within limit it is ErrUnavailable.
func (l *link) call(ctx context.Context, m message, limit time.Duration, take func(reply message) error) error {
	if err := ctx.Err(); err != nil {
		return contextError(opNames[m.op], err)
	}
	s, err := l.acquire(ctx, m.op)
	if err != nil {
		return err
	}
	if err := l.occupy(s, &m, limit); err != nil {
		return err
	}
	if err := l.w.send(ctx, &m); err != nil {
		l.release(s)
		if ctx.Err() != nil {
			return contextError(opNames[m.op], ctx.Err())
		}
		if dead := l.cause(); dead != nil {
			return dead
		}
		return unavailablef("%s: %v", opNames[m.op], err)
	}
	select {
	case err = <-s.done:
	case <-ctx.Done():
		if l.desert(s, slotWaiting) {
			return contextError(opNames[m.op], ctx.Err())
		}
		err = <-s.done
	}
	if err == nil {
		err = l.read(s, take)
	} else if l.desert(s, slotOverdue) {
		return err
	}
	l.release(s)
	return err
}

// occupy makes the slot wait for the answer to m.
func (l *link) occupy(s *slot, m *message, limit time.Duration) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead != nil {
		return l.dead
	}
	l.seq++
	l.users++
	s.id, s.op, s.state, s.started, s.limit = l.seq<<indexBits|uint64(s.index), m.op, slotWaiting, time.Since(l.base), limit
	m.id = s.id
	return nil
}

// read gives the reply to take, or returns the error in it.
func (l *link) read(s *slot, take func(message) error) error {
	reply, err := parse(s.frame)
	if err == nil {
		err = replyError(reply)
	}
	if err != nil {
		if err == errFrame {
			return unavailablef("%s: the PKCS#11 process answered with a malformed frame", opNames[s.op])
		}
		l.note(err)
		if errors.Is(err, hsm.ErrUnavailable) && s.op != opOpen {
			l.ails()
		}
		return err
	}
	if s.op != opOpen {
		l.useful.Store(true)
		l.sick.Store(0)
	}
	if take == nil {
		return nil
	}
	return take(reply)
}

// sickLimit is how long the device may fail without a success in between before its
// process is ended. A new one may find what this one has lost: a library in which a
// health check hangs does not initialise again.
const sickLimit = 10 * time.Second

// ails notes that the device has failed.
func (l *link) ails() {
	now := max(time.Since(l.base), 1)
	if l.sick.CompareAndSwap(0, int64(now)) || now-time.Duration(l.sick.Load()) < l.sickLimit {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.giveUp("it was ended because the device has failed for " + l.sickLimit.String())
}

// giveUp asks for another process, once. It runs under mu.
func (l *link) giveUp(why string) {
	if !l.given {
		l.given = true
		go l.hopeless(why)
	}
}

// desert leaves a call in the given state to itself. It reports false when the call
// is in another state: then there is, or will be, an outcome.
func (l *link) desert(s *slot, in slotState) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if s.state != in {
		return false
	}
	s.state = slotDeserted
	l.leave()
	return true
}

// release frees the slot of a call that has ended.
func (l *link) release(s *slot) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.put(s)
	l.leave()
}

// put wipes a slot and lets others have it. It runs under mu.
func (l *link) put(s *slot) {
	secret.Wipe(s.frame)
	s.large.Destroy()
	s.large, s.frame, s.state, s.id = nil, nil, slotFree, 0
	l.free <- s
}

// leave counts a user of the memory out. It runs under mu.
func (l *link) leave() {
	l.users--
	if l.users == 0 && l.dead != nil {
		l.destroy()
	}
}

func (l *link) destroy() {
	for _, s := range l.slots {
		s.large.Destroy()
		s.buf.Destroy()
	}
	l.w.end(hsm.ErrUnavailable)
}

// cause says why the link is dead, nil while it is not.
func (l *link) cause() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.dead
}

// fail ends the link: all calls under way and all later ones return err.
func (l *link) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.dead != nil {
		return
	}
	l.dead = err
	close(l.gone)
	close(l.stop)
	l.w.end(err)
	for _, s := range l.slots {
		switch s.state {
		case slotWaiting:
			s.state = slotDone
			s.done <- err
		case slotOverdue:
			s.state = slotDone
		}
	}
	l.leave()
}

// grace is how long past its deadline a call is waited for before the library counts
// as hung.
func grace(limit time.Duration) time.Duration { return min(limit/4, time.Second) }

// watch looks for calls past their deadline.
func (l *link) watch() {
	t := time.NewTicker(max(min(l.limit/20, 250*time.Millisecond), 5*time.Millisecond))
	defer t.Stop()
	for {
		select {
		case <-l.stop:
			return
		case <-t.C:
			l.look(time.Since(l.base))
		}
	}
}

func (l *link) look(now time.Duration) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.slots {
		if s.state == slotFree || s.state == slotDone {
			continue
		}
		age := now - s.started
		if age > s.limit && s.state == slotWaiting {
			s.state = slotOverdue
			s.done <- unavailablef("%s: no answer within %v", opNames[s.op], s.limit)
		}
		if age > s.limit+grace(s.limit) {
			l.giveUp(fmt.Sprintf("it was killed because a call (%s) hung in the library", opNames[s.op]))
		}
	}
}
