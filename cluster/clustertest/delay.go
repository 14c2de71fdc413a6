package clustertest

import (
	"context"
	"fmt"
	"hash/fnv"
	"math/rand/v2"
	"net"
	"sync"
	"time"
)

// Delays make the wires between members slow, as between continents. What a wire
// does to the n-th segment of the k-th connection from one member to another depends on Seed
// and these numbers alone. The zero value is loopback as it is.
type Delays struct {
	OneWay func(from, to int) time.Duration // of each segment; by index of the members
	Jitter time.Duration                    // up to this much more, evenly spread; order is kept
	Loss   float64                          // share of the segments that are lost and arrive with the retransmission, after Resend
	Resend time.Duration                    // default: 200 ms more than there and back
	Seed   uint64
}

// Everywhere is a delay between any two members.
func Everywhere(d time.Duration) func(int, int) time.Duration {
	return func(int, int) time.Duration { return d }
}

// delays are Delays between addresses.
type delays struct {
	Delays
	member map[string]int // by address

	mu      sync.Mutex        // also for member
	dialler map[string]string // member's address by the address that a connection comes from
	counts  map[[2]int]uint64 // connections made
}

func newDelays(d Delays, members []*Member) *delays {
	if d.OneWay == nil {
		return nil
	}
	s := &delays{Delays: d, member: map[string]int{}, dialler: map[string]string{}, counts: map[[2]int]uint64{}}
	for i, m := range members {
		s.member[m.Address] = i
	}
	return s
}

// add makes a new member's wires slow too.
func (d *delays) add(address string, member int) {
	if d == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.member[address] = member
}

// of returns a member's index.
func (d *delays) of(address string) int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.member[address]
}

// dial connects after a round trip.
func (d *delays) dial(ctx context.Context, from, to string) (net.Conn, error) {
	if d == nil {
		return new(net.Dialer).DialContext(ctx, "tcp", to)
	}
	a, b := d.of(from), d.of(to)
	select {
	case <-time.After(d.OneWay(a, b) + d.OneWay(b, a)):
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	c, err := new(net.Dialer).DialContext(ctx, "tcp", to)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	d.dialler[c.LocalAddr().String()] = from
	d.mu.Unlock()
	return newSlow(c, d.line(a, b)), nil
}

// listen listens for a member whose answers are slow too.
func (d *delays) listen(address string, ln net.Listener) (net.Listener, error) {
	if ln == nil {
		var err error
		if ln, err = net.Listen("tcp", address); err != nil {
			return nil, err
		}
	}
	return &slowListener{Listener: ln, delays: d, self: d.of(address)}, nil
}

// line returns the delay of each next segment of a new connection in one direction.
func (d *delays) line(from, to int) func() time.Duration {
	d.mu.Lock()
	d.counts[[2]int{from, to}]++
	h := fnv.New64a()
	fmt.Fprint(h, from, to, d.counts[[2]int{from, to}])
	d.mu.Unlock()
	random := rand.New(rand.NewPCG(d.Seed, h.Sum64()))
	base := d.OneWay(from, to)
	resend := d.Resend
	if resend == 0 {
		resend = base + d.OneWay(to, from) + 200*time.Millisecond
	}
	return func() time.Duration {
		t := base
		if d.Jitter > 0 {
			t += time.Duration(random.Int64N(int64(d.Jitter)))
		}
		for random.Float64() < d.Loss {
			t += resend
		}
		return t
	}
}

type slowListener struct {
	net.Listener
	delays *delays
	self   int
}

// Accept implements net.Listener.
func (l *slowListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	line := sync.OnceValue(func() func() time.Duration {
		l.delays.mu.Lock()
		from, ok := l.delays.dialler[c.RemoteAddr().String()] // whoever has sent something has registered
		l.delays.mu.Unlock()
		if !ok {
			return func() time.Duration { return 0 }
		}
		return l.delays.line(l.self, l.delays.of(from))
	})
	return newSlow(c, func() time.Duration { return line()() }), nil
}

// slow is one end of a connection whose writes arrive later, in order. Closing it
// loses what is still under way.
type slow struct {
	net.Conn
	next func() time.Duration

	mu      sync.Mutex
	queue   []segment
	last    time.Time // when the last segment of the queue arrives
	started bool
	wake    chan struct{}
	closed  chan struct{}
	once    sync.Once
}

type segment struct {
	due time.Time
	b   []byte
}

// newSlow takes c over; next tells the delay of the next segment.
func newSlow(c net.Conn, next func() time.Duration) *slow {
	return &slow{Conn: c, next: next, wake: make(chan struct{}, 1), closed: make(chan struct{})}
}

// Write implements net.Conn. It never waits.
func (s *slow) Write(b []byte) (int, error) {
	select {
	case <-s.closed:
		return 0, net.ErrClosed
	default:
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	due := time.Now().Add(s.next())
	if due.Before(s.last) {
		due = s.last
	}
	s.last = due
	s.queue = append(s.queue, segment{due, append([]byte(nil), b...)})
	if !s.started {
		s.started = true
		go s.deliver()
	}
	select {
	case s.wake <- struct{}{}:
	default:
	}
	return len(b), nil
}

// deliver writes the segments when they are due, until the connection is closed.
func (s *slow) deliver() {
	for {
		s.mu.Lock()
		var head *segment
		if len(s.queue) > 0 {
			head = &s.queue[0]
		}
		s.mu.Unlock()
		if head == nil {
			select {
			case <-s.wake:
				continue
			case <-s.closed:
				return
			}
		}
		timer := time.NewTimer(time.Until(head.due))
		select {
		case <-timer.C:
		case <-s.closed:
			timer.Stop()
			return
		}
		if _, err := s.Conn.Write(head.b); err != nil {
			_ = s.Close()
			return
		}
		s.mu.Lock()
		s.queue = s.queue[1:]
		s.mu.Unlock()
	}
}

// SetDeadline implements net.Conn: for reads, since Write never waits.
func (s *slow) SetDeadline(t time.Time) error { return s.Conn.SetReadDeadline(t) }

// SetWriteDeadline implements net.Conn.
func (s *slow) SetWriteDeadline(time.Time) error { return nil }

// Close implements net.Conn.
func (s *slow) Close() error {
	s.once.Do(func() { close(s.closed) })
	return s.Conn.Close()
}
