package cluster

import (
	"bufio"
	"context"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// writeTimeout bounds how long a frame may take to be taken over by the peer.
const writeTimeout = 30 * time.Second

// links keeps one connection to each peer for the calling side of the forward
// protocol. Requests share it; its reader notices at once when it breaks, so that
// the next request dials anew rather than finding out halfway.
type links struct {
	stream  *stream
	cluster string
	foreign func(peer string, g greeting) // a peer of another epoch has answered
	removed func(peer, proposal string)   // a peer says that this node was removed

	mu    sync.Mutex
	links map[string]*slot
}

// slot is the place of a peer's link. gate is held while it is looked up or made.
type slot struct {
	gate chan struct{}
	link *link
}

func newLinks(s *stream, cluster string) *links {
	return &links{stream: s, cluster: cluster, links: map[string]*slot{}}
}

// link is one live connection.
type link struct {
	conn *nodeConn
	dead chan struct{} // closed when the connection is of no more use

	write sync.Mutex // serialises frames

	mu      sync.Mutex
	next    uint64
	pending map[uint64]chan response
}

// get returns the live link to a peer, dialling if there is none. An error means
// that nothing was sent.
func (l *links) get(ctx context.Context, peer string) (*link, error) {
	l.mu.Lock()
	s, ok := l.links[peer]
	if !ok {
		s = &slot{gate: make(chan struct{}, 1)}
		l.links[peer] = s
	}
	l.mu.Unlock()

	select {
	case s.gate <- struct{}{}:
		defer func() { <-s.gate }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	if s.link != nil && s.link.alive() {
		return s.link, nil
	}
	fresh, err := l.dial(ctx, peer)
	if err != nil {
		return nil, err
	}
	s.link = fresh
	return fresh, nil
}

// dial connects and waits for the greeting: only then has the peer accepted this
// node's certificate (in TLS 1.3 a client is done before the server has looked).
func (l *links) dial(ctx context.Context, peer string) (*link, error) {
	conn, err := l.stream.dialNode(ctx, peer, l.stream.protos.forward)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	_ = conn.SetReadDeadline(time.Now().Add(handshakeTimeout))
	r := bufio.NewReader(conn)
	var g greeting
	if err := readFrame(r, maxGreeting, &g); err != nil {
		_ = conn.Close()
		return nil, kms.Wrap(kms.Unavailable, err, "node "+peer+" did not accept the connection", "")
	}
	if g.Node != peer || g.Cluster != l.cluster {
		_ = conn.Close()
		return nil, refuse("node %s answers as node %q of cluster %q", peer, g.Node, g.Cluster)
	}
	if conn.proto() != l.stream.protos.forward || g.Epoch != l.stream.protos.epoch {
		_ = conn.Close()
		l.foreign(peer, g)
		return nil, refuse("node %s is in epoch %d of the cluster, this node is in epoch %d", peer, g.Epoch, l.stream.protos.epoch)
	}
	if g.Removed != "" {
		_ = conn.Close()
		l.removed(peer, g.Removed)
		return nil, refuse("node %s says that this node was removed from the cluster", peer)
	}
	_ = conn.SetReadDeadline(time.Time{})
	k := &link{conn: conn, dead: make(chan struct{}), pending: map[uint64]chan response{}}
	if !l.stream.spawn(func() { k.read(r) }) {
		_ = conn.Close()
		return nil, errStopping
	}
	return k, nil
}

func (k *link) alive() bool {
	select {
	case <-k.dead:
		return false
	default:
		return true
	}
}

// read delivers responses until the connection ends.
func (k *link) read(r *bufio.Reader) {
	defer close(k.dead)
	defer k.conn.Close()
	for {
		var resp response
		if err := readFrame(r, maxFrame, &resp); err != nil {
			return
		}
		k.mu.Lock()
		ch, ok := k.pending[resp.ID]
		delete(k.pending, resp.ID)
		k.mu.Unlock()
		if ok {
			ch <- resp // buffered
		}
	}
}

// call sends a request and waits for its response. sent is false only if the
// peer has certainly not received the request.
func (k *link) call(ctx context.Context, req request) (resp response, sent bool, err error) {
	ch := make(chan response, 1)
	k.mu.Lock()
	k.next++
	req.ID = k.next
	k.pending[req.ID] = ch
	k.mu.Unlock()
	defer func() {
		k.mu.Lock()
		delete(k.pending, req.ID)
		k.mu.Unlock()
	}()
	req.expect(ctx)

	k.write.Lock()
	if !k.alive() || ctx.Err() != nil {
		k.write.Unlock()
		return response{}, false, kms.Errorf(kms.Unavailable, "the connection to node %s is closed", k.conn.peer)
	}
	_ = k.conn.SetWriteDeadline(time.Now().Add(writeTimeout))
	err = writeFrame(k.conn, req)
	k.write.Unlock()
	if err != nil {
		_ = k.conn.Close() // a frame may be cut short: nothing more can follow it
		return response{}, true, err
	}

	select {
	case resp = <-ch:
		return resp, true, nil
	case <-ctx.Done():
		return response{}, true, ctx.Err()
	case <-k.dead:
	}
	select { // the response may have come just before the end
	case resp = <-ch:
		return resp, true, nil
	default:
		return response{}, true, kms.Errorf(kms.Unavailable, "the connection to node %s broke", k.conn.peer)
	}
}
