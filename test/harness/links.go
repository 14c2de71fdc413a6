package harness

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Link is the way from one node to another; the way back is another Link.
type Link struct{ From, To string }

// Links are the wires between the nodes of a coalition: for each node a proxy on
// loopback, whose address the other nodes dial. What a node sends to another can be
// delayed and held back, in each direction by itself.
//
// All nodes dial the same address, so the proxy finds out who does: the dialler's
// port leads through /proc/net/tcp to a socket, and the sockets that a process has
// open stand in /proc/PID/fd. A connection of nobody known is closed.
//
// A cut holds what is sent, as TCP does behind a broken cable, and nobody is told.
// Healing lets it through, or breaks the connections that have been held.
type Links struct {
	who func() map[int]string // nodes by process id

	mu      sync.Mutex
	rand    *rand.Rand
	cut     map[Link]int // how many faults cut it
	delay   map[Link]time.Duration
	jitter  float64 // of a delay, in either direction
	changed chan struct{}
	lines   map[*line]struct{}
	fronts  []net.Listener
	closed  bool
	wg      sync.WaitGroup
}

// NewLinks returns links without any disturbance. who names the nodes by the ids of
// their processes.
func NewLinks(who func() map[int]string, seed uint64) *Links {
	return &Links{
		who: who, rand: rand.New(rand.NewPCG(seed, 0)), cut: map[Link]int{}, delay: map[Link]time.Duration{}, jitter: 0.2,
		changed: make(chan struct{}), lines: map[*line]struct{}{},
	}
}

// Front opens a proxy in front of the node, which listens at address, and returns
// the address that the others are to dial.
func (l *Links) Front(node, address string) (string, error) {
	front, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	l.mu.Lock()
	l.fronts = append(l.fronts, front)
	l.mu.Unlock()
	l.wg.Go(func() {
		for {
			c, err := front.Accept()
			if err != nil {
				return // it is closed
			}
			l.wg.Go(func() { l.connect(c, node, address) })
		}
	})
	return front.Addr().String(), nil
}

// connect joins an accepted connection with the node.
func (l *Links) connect(in net.Conn, node, address string) {
	from, err := l.dialler(in)
	if err != nil {
		in.Close()
		return
	}
	out, err := net.Dial("tcp", address)
	if err != nil {
		in.Close()
		return
	}
	ln := &line{links: l, a: in, b: out, there: Link{from, node}, back: Link{node, from}, done: make(chan struct{})}
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		ln.close()
		return
	}
	l.lines[ln] = struct{}{}
	l.mu.Unlock()
	var both sync.WaitGroup
	both.Go(func() { ln.carry(out, in, ln.there) })
	both.Go(func() { ln.carry(in, out, ln.back) })
	both.Wait()
	ln.close()
	l.mu.Lock()
	delete(l.lines, ln)
	l.mu.Unlock()
}

// dialler returns the node that has opened the connection.
func (l *Links) dialler(c net.Conn) (string, error) {
	inode, err := socketOf(c.RemoteAddr().(*net.TCPAddr), c.LocalAddr().(*net.TCPAddr))
	if err != nil {
		return "", err
	}
	want := "socket:[" + inode + "]"
	for pid, node := range l.who() {
		dir := "/proc/" + strconv.Itoa(pid) + "/fd/"
		fds, err := os.ReadDir(dir)
		if err != nil {
			continue // it has ended
		}
		for _, fd := range fds {
			if to, err := os.Readlink(dir + fd.Name()); err == nil && to == want {
				return node, nil
			}
		}
	}
	return "", fmt.Errorf("no node has opened the connection from %s", c.RemoteAddr())
}

// socketOf returns the inode of the socket with these ends, both on IPv4 loopback,
// as in /proc/net/tcp: proc(5).
func socketOf(local, remote *net.TCPAddr) (string, error) {
	f, err := os.Open("/proc/net/tcp")
	if err != nil {
		return "", err
	}
	defer f.Close()
	hex := func(a *net.TCPAddr) string { // the address in host byte order, as the kernel prints it
		ip := a.IP.To4()
		return fmt.Sprintf("%02X%02X%02X%02X:%04X", ip[3], ip[2], ip[1], ip[0], a.Port)
	}
	from, to := hex(local), hex(remote)
	for s := bufio.NewScanner(f); s.Scan(); {
		fields := strings.Fields(s.Text())
		if len(fields) > 9 && fields[1] == from && fields[2] == to {
			return fields[9], nil
		}
	}
	return "", fmt.Errorf("no socket from %s to %s", local, remote)
}

// Cut holds back everything that is sent over a link until Heal. Cuts add up.
func (l *Links) Cut(links ...Link) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, k := range links {
		l.cut[k]++
	}
}

// Heal ends a Cut of the same links. With broken, connections that have lost their
// way meanwhile break; otherwise what was held arrives.
func (l *Links) Heal(broken bool, links ...Link) {
	l.mu.Lock()
	var lost []*line
	for _, k := range links {
		if l.cut[k]--; l.cut[k] <= 0 {
			delete(l.cut, k)
		}
		for ln := range l.lines {
			if broken && (ln.there == k || ln.back == k) {
				lost = append(lost, ln)
			}
		}
	}
	close(l.changed)
	l.changed = make(chan struct{})
	l.mu.Unlock()
	for _, ln := range lost {
		ln.close()
	}
}

// Delay sets how long what is sent over a link is under way.
func (l *Links) Delay(d time.Duration, links ...Link) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, k := range links {
		l.delay[k] = d
	}
}

// Slow returns how long a link takes.
func (l *Links) Slow(k Link) time.Duration {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.delay[k]
}

// due is when what is sent now over a link arrives.
func (l *Links) due(k Link) time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	d := l.delay[k]
	if d > 0 {
		d += time.Duration(float64(d) * l.jitter * (2*l.rand.Float64() - 1))
	}
	return time.Now().Add(d)
}

// open waits until a link is not cut.
func (l *Links) open(k Link, done <-chan struct{}) bool {
	for {
		l.mu.Lock()
		cut, changed := l.cut[k] > 0, l.changed
		l.mu.Unlock()
		if !cut {
			return true
		}
		select {
		case <-changed:
		case <-done:
			return false
		}
	}
}

// Close closes the proxies and all connections.
func (l *Links) Close() {
	l.mu.Lock()
	l.closed = true
	for _, f := range l.fronts {
		f.Close()
	}
	for ln := range l.lines {
		ln.close()
	}
	l.mu.Unlock()
	l.wg.Wait()
}

// line is one connection between two nodes.
type line struct {
	links       *Links
	a, b        net.Conn // of the dialler and of the one dialled
	there, back Link
	once        sync.Once
	done        chan struct{}
}

func (ln *line) close() {
	ln.once.Do(func() {
		close(ln.done)
		ln.a.Close()
		ln.b.Close()
	})
}

// piece is what was sent at once, nil for the end.
type piece struct {
	b   []byte
	due time.Time
}

// carry moves what is sent over a link until it ends. An end travels like
// everything else.
func (ln *line) carry(dst, src net.Conn, k Link) {
	queue := make(chan piece, 4096)
	ln.links.wg.Go(func() {
		defer close(queue)
		for {
			b := make([]byte, 32<<10)
			n, err := src.Read(b)
			if n > 0 {
				select {
				case queue <- piece{b[:n], ln.links.due(k)}:
				case <-ln.done:
					return
				}
			}
			if err != nil {
				select {
				case queue <- piece{nil, ln.links.due(k)}:
				case <-ln.done:
				}
				return
			}
		}
	})
	timer := time.NewTimer(0)
	defer timer.Stop()
	for p := range queue {
		if wait := time.Until(p.due); wait > 0 {
			timer.Reset(wait)
			select {
			case <-timer.C:
			case <-ln.done:
				return
			}
		}
		if !ln.links.open(k, ln.done) {
			return
		}
		if p.b == nil {
			_ = dst.(*net.TCPConn).CloseWrite()
			return
		}
		if _, err := dst.Write(p.b); err != nil {
			ln.close()
			return
		}
	}
}
