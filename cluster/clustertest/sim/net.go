package sim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// errLost is what a caller sees of a message or an answer that did not come.
var errLost = errors.New("sim: no answer")

// link is the way from one host to another.
type link struct {
	cut   bool
	sent  map[string]uint64 // by kind
	dice  dice
	delay time.Duration // one way
}

// network carries messages between the present lives of the hosts. Each message is
// delayed, lost or doubled by dice that depend on its link, its kind and its number among those, an
// answer by those of its request: so later ones overtake earlier ones, and it does not
// matter which of two goroutines comes first at one instant.
type network struct {
	mu     sync.Mutex
	links  map[[2]string]*link
	lives  map[string]*life
	jitter time.Duration
	loss   float64
	double float64
	counts struct{ sent, lost, doubled int }
}

func newNetwork(d dice, ids []string) *network {
	n := &network{links: map[[2]string]*link{}, lives: map[string]*life{}}
	for _, a := range ids {
		for _, b := range ids {
			n.links[[2]string{a, b}] = &link{sent: map[string]uint64{}, dice: d.of("link " + a + " " + b)}
		}
	}
	return n
}

// cut opens or closes the way from a to b.
func (n *network) cut(a, b string, cut bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.links[[2]string{a, b}].cut = cut
}

func (n *network) healAll() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, l := range n.links {
		l.cut = false
	}
	n.loss, n.double = 0, 0
}

// setLoss sets how many messages are lost and doubled from now on.
func (n *network) setLoss(loss, double float64) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.loss, n.double = loss, double
}

func (n *network) open(from, to string) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return !n.links[[2]string{from, to}].cut
}

// join makes l the life that gets its host's messages; nil: nobody does.
func (n *network) join(id string, l *life) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.lives[id] = l
}

func (n *network) at(id string) *life {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.lives[id]
}

// throw returns the dice of the next request of a kind.
func (n *network) throw(from, to, kind string) dice {
	n.mu.Lock()
	defer n.mu.Unlock()
	l := n.links[[2]string{from, to}]
	l.sent[kind]++
	return l.dice.of(kind).nth(l.sent[kind])
}

// send has arrive called at the host to, later, once, twice or never. It is called
// from a goroutine of its own with the life that is there then and the number of the
// copy, 0 or 1. tcp: not doubled.
func (n *network) send(from *life, to string, d dice, tcp bool, arrive func(l *life, copy int)) {
	n.mu.Lock()
	l := n.links[[2]string{from.host.id, to}]
	n.counts.sent++
	lost := l.cut || d.of("loss").chance(n.loss)
	copies := 1
	if !tcp && d.of("double").chance(n.double) {
		copies, n.counts.doubled = 2, n.counts.doubled+1
	}
	if lost {
		n.counts.lost++
	}
	delay, jitter := l.delay, n.jitter
	n.mu.Unlock()
	if lost || from.isDead() {
		return
	}
	for c := range copies {
		own := d.nth(uint64(c))
		wait := delay + own.of("jitter").upTo(jitter) + own.of("instant").upTo(time.Microsecond)
		time.AfterFunc(wait, func() {
			if l := n.at(to); l != nil && n.open(from.host.id, to) {
				l.host.gate(l)
				if !l.isDead() {
					arrive(l, c)
				}
			}
		})
	}
}

// wire is a life's end of the network. It implements cluster.Wire.
type wire struct {
	life     *life
	timeout  time.Duration
	consumer chan raft.RPC
	hung     chan struct{} // closed by HangUp
	closed   chan struct{} // closed by Close
	once     [2]sync.Once

	mu        sync.Mutex
	heartbeat func(raft.RPC)
	answer    func(ctx context.Context, peer string, request []byte) []byte
}

func newWire(l *life, timeout time.Duration) *wire {
	return &wire{life: l, timeout: timeout, consumer: make(chan raft.RPC), hung: make(chan struct{}), closed: make(chan struct{})}
}

// Consumer implements raft.Transport, as do the following.
func (w *wire) Consumer() <-chan raft.RPC { return w.consumer }

// LocalAddr returns the node's id.
func (w *wire) LocalAddr() raft.ServerAddress { return raft.ServerAddress(w.life.host.id) }

// EncodePeer returns the id as it is, and DecodePeer too.
func (w *wire) EncodePeer(_ raft.ServerID, a raft.ServerAddress) []byte { return []byte(a) }
func (w *wire) DecodePeer(b []byte) raft.ServerAddress                  { return raft.ServerAddress(b) }

// AppendEntriesPipeline is not supported, as over TLS with MaxRPCsInFlight 1.
func (w *wire) AppendEntriesPipeline(raft.ServerID, raft.ServerAddress) (raft.AppendPipeline, error) {
	return nil, raft.ErrPipelineReplicationNotSupported
}

// SetHeartbeatHandler keeps the way for heartbeats past Raft's main goroutine.
func (w *wire) SetHeartbeatHandler(f func(raft.RPC)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.heartbeat = f
}

// AppendEntries carries a copy: Raft changes and shares its requests.
func (w *wire) AppendEntries(_ raft.ServerID, to raft.ServerAddress, args *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if !w.life.isDead() { // what is left of a crashed process may still win an election, and tell nobody
		w.life.host.s.watch.leads(args.Term, string(args.Addr))
	}
	fresh := func() any {
		c := *args
		c.Entries = make([]*raft.Log, len(args.Entries))
		for i, e := range args.Entries {
			l := *e
			c.Entries[i] = &l
		}
		return &c
	}
	kind := "append"
	if beats(args) {
		kind = "heartbeat"
	}
	return call(w, to, kind, fresh, nil, resp)
}

// beats reports whether a request is a heartbeat, as Raft's own transport tells them.
func beats(a *raft.AppendEntriesRequest) bool {
	return a.PrevLogEntry == 0 && a.PrevLogTerm == 0 && len(a.Entries) == 0 && a.LeaderCommitIndex == 0
}

// RequestVote asks for a vote.
func (w *wire) RequestVote(_ raft.ServerID, to raft.ServerAddress, args *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	return call(w, to, "vote", func() any { c := *args; return &c }, nil, resp)
}

// RequestPreVote implements raft.WithPreVote.
func (w *wire) RequestPreVote(_ raft.ServerID, to raft.ServerAddress, args *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	return call(w, to, "pre-vote", func() any { c := *args; return &c }, nil, resp)
}

// TimeoutNow has a node seek the lead.
func (w *wire) TimeoutNow(_ raft.ServerID, to raft.ServerAddress, args *raft.TimeoutNowRequest, resp *raft.TimeoutNowResponse) error {
	return call(w, to, "timeout", func() any { c := *args; return &c }, nil, resp)
}

// InstallSnapshot carries a snapshot in one message.
func (w *wire) InstallSnapshot(_ raft.ServerID, to raft.ServerAddress, args *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	b, err := io.ReadAll(data)
	if err != nil {
		return err
	}
	w.life.host.s.count("snapshots sent")
	return call(w, to, "snapshot", func() any { c := *args; return &c }, b, resp)
}

// call sends a request of Raft's and waits for its response as long as the
// transport's time-out.
func call[T any](w *wire, to raft.ServerAddress, kind string, fresh func() any, data []byte, resp *T) error {
	h := w.life.host
	h.gate(w.life)
	answers := make(chan raft.RPCResponse, 2) // a doubled request may be answered twice
	copies := [2]any{fresh(), fresh()}        // now: the caller uses its request again
	d := h.s.net.throw(h.id, string(to), kind)
	h.s.net.send(w.life, string(to), d, false, func(peer *life, n int) {
		r, ok := peer.wire.handle(copies[n], data)
		if !ok {
			return
		}
		h.s.net.send(peer, h.id, d.of("answer").nth(uint64(n)), true, func(back *life, _ int) {
			if back == w.life {
				select {
				case answers <- r:
				default: // the request was doubled, and so was the answer
				}
			}
		})
	})
	limit := time.NewTimer(w.timeout)
	defer limit.Stop()
	select {
	case r := <-answers:
		h.gate(w.life)
		if r.Error != nil {
			return r.Error
		}
		*resp = *r.Response.(*T)
		return nil
	case <-limit.C:
	case <-w.hung:
	case <-w.closed:
	case <-w.life.died:
	}
	return errLost
}

// handle gives a request to Raft and waits for its response.
func (w *wire) handle(req any, data []byte) (raft.RPCResponse, bool) {
	done := make(chan raft.RPCResponse, 1)
	rpc := raft.RPC{Command: req, RespChan: done}
	if data != nil {
		rpc.Reader = bytes.NewReader(data)
	}
	w.mu.Lock()
	beat := w.heartbeat
	w.mu.Unlock()
	if a, ok := req.(*raft.AppendEntriesRequest); ok && beat != nil && beats(a) {
		beat(rpc)
	} else {
		select {
		case w.consumer <- rpc:
		case <-w.closed:
			return raft.RPCResponse{}, false
		case <-w.life.died:
			return raft.RPCResponse{}, false
		}
	}
	select {
	case r := <-done:
		return r, true
	case <-w.closed:
	case <-w.life.died:
	}
	return raft.RPCResponse{}, false
}

// Call implements cluster.Wire: it stands for TLS over TCP, so requests are neither
// doubled nor lost without the caller noticing, at the latest when its time is over.
func (w *wire) Call(ctx context.Context, to string, request []byte) ([]byte, bool, error) {
	h := w.life.host
	h.gate(w.life)
	peer := h.s.net.at(to)
	if peer == nil || w.isHung() {
		return nil, false, errLost // refused at once
	}
	answers := make(chan []byte, 1)
	d := h.s.net.throw(h.id, to, fmt.Sprint("call ", len(request))) // by length: what a node asks for has its own
	h.s.net.send(w.life, to, d, true, func(l *life, _ int) {
		if l != peer {
			return // a new process does not know the connection
		}
		b := l.wire.respond(h.id, request)
		if b == nil {
			return
		}
		h.s.net.send(l, h.id, d.of("answer"), true, func(back *life, _ int) {
			if back == w.life {
				answers <- b
			}
		})
	})
	select {
	case b := <-answers:
		h.gate(w.life)
		return b, true, nil
	case <-ctx.Done():
	case <-w.hung:
	case <-w.life.died:
	case <-peer.died: // the connection breaks
	}
	return nil, true, errLost
}

func (w *wire) respond(from string, request []byte) []byte {
	w.mu.Lock()
	answer := w.answer
	w.mu.Unlock()
	if answer == nil || w.isHung() {
		return nil
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	stop := make(chan struct{})
	defer close(stop)
	go func() {
		select {
		case <-w.hung:
		case <-w.life.died:
		case <-stop:
		}
		cancel()
	}()
	return answer(ctx, from, request)
}

// Serve implements cluster.Wire.
func (w *wire) Serve(answer func(ctx context.Context, peer string, request []byte) []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.answer = answer
}

// HangUp implements cluster.Wire.
func (w *wire) HangUp() { w.once[0].Do(func() { close(w.hung) }) }

// Close implements raft.WithClose.
func (w *wire) Close() error {
	w.once[1].Do(func() { close(w.closed) })
	return nil
}

func (w *wire) isHung() bool {
	select {
	case <-w.hung:
		return true
	default:
		return false
	}
}
