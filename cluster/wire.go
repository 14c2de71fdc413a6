package cluster

import (
	"context"
	"crypto/tls"
	"net"
	"time"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
)

// LogStore keeps Raft's log, its term and its vote.
type LogStore interface {
	raft.LogStore
	raft.StableStore
	Close() error
}

// Wire carries the messages between nodes: Raft's and those of the forward
// protocol. The addresses that Raft gives it are node ids. When Raft stops it calls
// Close, where the Wire has one.
type Wire interface {
	raft.Transport

	// Call sends a request to a peer and returns its response. sent is false only if
	// the peer has certainly not received it.
	Call(ctx context.Context, peer string, request []byte) (response []byte, sent bool, err error)
	// Serve begins to answer requests. answer may be called concurrently; ctx ends
	// when the answer is of no more use.
	Serve(answer func(ctx context.Context, peer string, request []byte) (response []byte))
	// HangUp ends all calls and makes no more.
	HangUp()
}

// wire is what the node needs of Wire or of its own TLS listener.
type wire interface {
	transport() raft.Transport
	// call connects within the time dial where there is no connection. sent is false
	// only if the peer has certainly not received the request.
	call(ctx context.Context, peer string, dial time.Duration, req request) (resp response, sent bool, err error)
	serve(n *Node)
	group(peer string) (tls.CurveID, bool) // of the last handshake
	connected() []string                   // peers that there are connections with
	drop(peer string)                      // closes them
	recheck(skip func(peer string) bool)   // closes those whose certificate is no longer good
	hangUp()
	Close() error
}

// tlsWire is the wire of a node with a listener.
type tlsWire struct {
	*stream
	links *links
	raft  *raft.NetworkTransport
}

// newWire returns the wire of the configuration, or the node's own.
func (n *Node) newWire(ctx context.Context, genesis *state.State) (wire, error) {
	if n.cfg.Wire != nil {
		return givenWire{n.cfg.Wire}, nil
	}
	ln := n.cfg.Listener
	if ln == nil {
		var err error
		var lc net.ListenConfig
		if ln, err = lc.Listen(ctx, "tcp", n.cfg.Listen); err != nil {
			return nil, kms.Wrap(kms.Invalid, err, "cannot listen for other nodes: "+err.Error(), "")
		}
	}
	s := newStream(n.cfg.NodeID, n.dir.protocols(), n.directory, n.cfg.Certificate, ln, n.cfg.Dial, n.cfg.Logger)
	links := newLinks(s, genesis.Cluster())
	links.foreign, links.removed = n.foreign, n.dismissed
	return &tlsWire{
		stream: s, links: links,
		raft: raft.NewNetworkTransportWithConfig(&raft.NetworkTransportConfig{
			Logger: raftLogger(n.cfg.Logger, *n.cfg.RaftLogLevel), Stream: s, MaxPool: 3, Timeout: n.cfg.Timing.RPC,
			MaxRPCsInFlight: 1, // more can wedge a follower (hashicorp/raft issue 612)
		}),
	}, nil
}

func (w *tlsWire) transport() raft.Transport { return w.raft }

func (w *tlsWire) serve(n *Node) {
	w.start(func(c *nodeConn) {
		g := n.greeting()
		if c.proto() != w.protos.forward { // of another epoch: it learns of this one, and that is all
			greet(c, g)
			return
		}
		if r, gone := n.State().Removal(c.peer); gone {
			g.Removed = r.Proposal
			greet(c, g)
			return
		}
		serveForward(n.ctx, c, g, n)
	})
}

func (w *tlsWire) call(ctx context.Context, peer string, dial time.Duration, req request) (response, bool, error) {
	dialing, cancel := context.WithTimeout(ctx, dial)
	defer cancel()
	k, err := w.links.get(dialing, peer)
	if err != nil {
		return response{}, false, err
	}
	return k.call(ctx, req)
}

// Close closes the transport, and with it the listener and its connections.
func (w *tlsWire) Close() error { return w.raft.Close() }

// givenWire is the wire of Config.Wire.
type givenWire struct{ w Wire }

func (g givenWire) transport() raft.Transport        { return g.w }
func (g givenWire) group(string) (tls.CurveID, bool) { return 0, false }
func (g givenWire) connected() []string              { return nil } // it knows who may connect
func (g givenWire) drop(string)                      {}
func (g givenWire) recheck(func(string) bool)        {}
func (g givenWire) hangUp()                          { g.w.HangUp() }

func (g givenWire) Close() error {
	g.w.HangUp()
	if c, ok := g.w.(raft.WithClose); ok {
		return c.Close()
	}
	return nil
}

func (g givenWire) serve(n *Node) {
	g.w.Serve(func(ctx context.Context, peer string, b []byte) []byte {
		var req request
		if err := canon.Unmarshal(b, &req); err != nil {
			return nil
		}
		ctx, cancel := context.WithTimeout(ctx, req.limit())
		defer cancel()
		resp := n.answer(ctx, peer, req)
		resp.ID = req.ID
		return canon.Marshal(resp)
	})
}

func (g givenWire) call(ctx context.Context, peer string, _ time.Duration, req request) (resp response, sent bool, err error) {
	req.expect(ctx)
	b, sent, err := g.w.Call(ctx, peer, canon.Marshal(req))
	if err != nil {
		return response{}, sent, err
	}
	return resp, sent, canon.Unmarshal(b, &resp)
}
