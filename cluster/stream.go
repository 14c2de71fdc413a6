package cluster

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms"
)

// Limits of the listener. Connections that have not finished their handshake are
// few and short-lived, so a stranger cannot hold many.
const (
	handshakeTimeout = 10 * time.Second
	maxHandshakes    = 128
	maxConnsPerPeer  = 64
)

// nodeConn is an authenticated connection to or from another node. It closes
// itself when the peer's certificate expires.
type nodeConn struct {
	*tls.Conn
	peer   string
	stream *stream
	expiry *time.Timer
	once   sync.Once
}

// Close closes the connection and forgets it. A connection to a peer that does
// not read is closed all the same.
func (c *nodeConn) Close() error {
	c.once.Do(func() { c.stream.forget(c) })
	// tls.Conn.Close first tries to send close_notify and may wait for seconds
	// behind a blocked write; the transport underneath does not.
	_ = c.Conn.NetConn().SetDeadline(time.Now())
	return c.Conn.NetConn().Close()
}

// nodeAddr is the address of a node as Raft sees it: its id. Where the node
// listens is looked up in the state when it is dialled.
type nodeAddr string

// Network implements net.Addr.
func (nodeAddr) Network() string { return "conclave" }

// String implements net.Addr.
func (a nodeAddr) String() string { return string(a) }

// dialFunc opens a plain connection to an address host:port.
type dialFunc func(ctx context.Context, address string) (net.Conn, error)

// stream is the node's listener and dialler. It implements raft.StreamLayer for
// the connections with ALPN conclave-raft/1 and gives the others to handle.
type stream struct {
	self   string
	protos protocols
	dir    func() directory
	cert   tls.Certificate
	ln     net.Listener
	dialTo dialFunc
	handle func(*nodeConn) // serves a forward connection, returns when it ends
	log    *slog.Logger

	ctx      context.Context
	cancel   context.CancelFunc
	calls    context.Context // of outgoing connections; ends before ctx
	endCalls context.CancelFunc
	wg       sync.WaitGroup
	accept   chan net.Conn

	mu     sync.Mutex
	conns  map[*nodeConn]struct{}
	groups map[string]tls.CurveID // of the last handshake with each peer
}

// newStream takes ln over. start must be called before anything is accepted.
func newStream(self string, protos protocols, dir func() directory, cert tls.Certificate, ln net.Listener, dial dialFunc, log *slog.Logger) *stream {
	if dial == nil {
		var d net.Dialer
		dial = func(ctx context.Context, address string) (net.Conn, error) { return d.DialContext(ctx, "tcp", address) }
	}
	s := &stream{self: self, protos: protos, dir: dir, cert: cert, ln: ln, dialTo: dial, log: log,
		accept: make(chan net.Conn), conns: map[*nodeConn]struct{}{}, groups: map[string]tls.CurveID{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.calls, s.endCalls = context.WithCancel(s.ctx)
	return s
}

// start begins to accept connections.
func (s *stream) start(handle func(*nodeConn)) {
	s.handle = handle
	s.wg.Go(s.acceptLoop)
}

func (s *stream) acceptLoop() {
	slots := make(chan struct{}, maxHandshakes)
	for {
		select {
		case slots <- struct{}{}:
		case <-s.ctx.Done():
			return
		}
		raw, err := s.ln.Accept()
		if err != nil {
			if s.ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return
			}
			s.log.Warn("cannot accept a connection from a node", "error", err)
			select { // out of file descriptors, most likely: do not spin
			case <-time.After(100 * time.Millisecond):
			case <-s.ctx.Done():
				return
			}
			<-slots
			continue
		}
		s.wg.Go(func() { s.serve(raw, func() { <-slots }) })
	}
}

// serve does the handshake of an accepted connection, calls handshaken, and
// hands the connection to its protocol.
func (s *stream) serve(raw net.Conn, handshaken func()) {
	c, err := s.handshake(s.ctx, raw, "", "")
	handshaken()
	if err != nil {
		if s.ctx.Err() == nil {
			s.log.Warn("refused a connection", "remote", raw.RemoteAddr().String(), "error", err)
		}
		return
	}
	if s.protos.speaksForward(c.proto()) {
		defer c.Close()
		s.handle(c)
		return
	}
	select {
	case s.accept <- c:
	case <-s.ctx.Done():
		_ = c.Close()
	}
}

// handshake authenticates raw, as client when want names the node dialled. It
// closes raw on error.
func (s *stream) handshake(ctx context.Context, raw net.Conn, want, proto string) (*nodeConn, error) {
	ctx, cancel := context.WithTimeout(ctx, handshakeTimeout)
	defer cancel()
	var peer string
	verify := func(cs tls.ConnectionState) error {
		switch p := cs.NegotiatedProtocol; {
		case want != "" && !slices.Contains(s.protos.offer(proto), p), !s.protos.speaksForward(p) && p != s.protos.raft:
			return refuse("no common protocol between nodes")
		}
		dir := s.dir()
		if d, ok := dir.(introductions); ok && want == "" && s.protos.speaksForward(cs.NegotiatedProtocol) {
			d.farewell = true
			dir = d
		}
		var err error
		peer, err = verifyPeer(dir, s.self, want, cs)
		return err
	}
	var conn *tls.Conn
	if want != "" {
		conn = tls.Client(raw, tlsConfig(s.cert, s.protos.offer(proto), verify))
	} else {
		conn = tls.Server(raw, tlsConfig(s.cert, s.protos.accept(), verify))
	}
	if err := conn.HandshakeContext(ctx); err != nil {
		_ = raw.Close()
		return nil, err
	}
	return s.register(&nodeConn{Conn: conn, peer: peer, stream: s})
}

// register keeps the connection in order to close it with the stream.
func (s *stream) register(c *nodeConn) (*nodeConn, error) {
	cs := c.ConnectionState()
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for o := range s.conns {
		if o.peer == c.peer {
			n++
		}
	}
	if s.calls.Err() != nil || n >= maxConnsPerPeer {
		_ = c.Conn.NetConn().Close()
		return nil, kms.Errorf(kms.Unavailable, "too many connections with node %s, or this node is stopping", c.peer)
	}
	s.conns[c] = struct{}{}
	s.groups[c.peer] = cs.CurveID
	c.expiry = time.AfterFunc(time.Until(cs.PeerCertificates[0].NotAfter), func() { _ = c.Close() })
	return c, nil
}

// spawn runs f in a goroutine that Close waits for; false if it is too late.
func (s *stream) spawn(f func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ctx.Err() != nil {
		return false
	}
	s.wg.Go(f)
	return true
}

func (s *stream) forget(c *nodeConn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	if c.expiry != nil {
		c.expiry.Stop()
	}
}

// connected returns the peers that there are connections with.
func (s *stream) connected() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var l []string
	for c := range s.conns {
		if !slices.Contains(l, c.peer) {
			l = append(l, c.peer)
		}
	}
	return l
}

// drop closes the connections with a peer.
func (s *stream) drop(peer string) {
	s.mu.Lock()
	var l []*nodeConn
	for c := range s.conns {
		if c.peer == peer {
			l = append(l, c)
		}
	}
	s.mu.Unlock()
	for _, c := range l {
		_ = c.Close()
	}
}

// recheck closes the connections with peers that would not be let in now, for their
// site's CA is trusted no more; but not those of whom skip says so.
func (s *stream) recheck(skip func(peer string) bool) {
	s.mu.Lock()
	l := slices.Collect(maps.Keys(s.conns))
	s.mu.Unlock()
	for _, c := range l {
		if skip(c.peer) {
			continue
		}
		if _, err := verifyPeer(s.dir(), s.self, c.peer, c.ConnectionState()); err != nil {
			s.log.Warn("closing a connection whose certificate is not trusted any more", "peer", c.peer, "error", err)
			_ = c.Close()
		}
	}
}

// group returns the key exchange group of the last handshake with a peer.
func (s *stream) group(peer string) (tls.CurveID, bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	g, ok := s.groups[peer]
	return g, ok
}

// dialNode connects to a node and makes sure that it is that node.
func (s *stream) dialNode(ctx context.Context, id, proto string) (*nodeConn, error) {
	node, ok := s.dir().Node(id)
	if !ok {
		return nil, kms.Errorf(kms.NotFound, "%q is not a node of this cluster", id)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(s.calls, cancel)()
	raw, err := s.dialTo(ctx, node.Address)
	if err != nil {
		return nil, err
	}
	return s.handshake(ctx, raw, id, proto)
}

// Dial implements raft.StreamLayer; the address is a node id.
func (s *stream) Dial(address raft.ServerAddress, timeout time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(s.calls, timeout)
	defer cancel()
	c, err := s.dialNode(ctx, string(address), s.protos.raft)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// Accept implements net.Listener for Raft's connections.
func (s *stream) Accept() (net.Conn, error) {
	select {
	case c := <-s.accept:
		return c, nil
	case <-s.ctx.Done():
		return nil, net.ErrClosed
	}
}

// Addr implements net.Listener.
func (s *stream) Addr() net.Addr { return nodeAddr(s.self) }

// hangUp ends all calls to other nodes and dials no more, so that nothing waits
// for a peer that does not answer.
func (s *stream) hangUp() {
	s.endCalls()
	s.mu.Lock()
	conns := make([]*nodeConn, 0, len(s.conns))
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		_ = c.Close()
	}
}

// Close implements net.Listener: it closes the listener and every connection,
// and waits for their handlers.
func (s *stream) Close() error {
	err := s.ln.Close()
	s.mu.Lock()
	s.cancel()
	s.mu.Unlock()
	s.hangUp()
	s.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
