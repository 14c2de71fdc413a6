package cluster

import (
	"io"
	"sync"

	"github.com/hashicorp/raft"
)

// guard is the transport that Raft sees. It lets nothing through while the node does
// not know whether it remembers its promises, and no part in an election while it
// knows that it does not.
type guard struct {
	raft.Transport
	p     *probation
	calls chan raft.RPC // to Raft
	done  chan struct{}
	once  sync.Once
}

// guardPreVote is guard over a transport with pre-votes.
type guardPreVote struct {
	*guard
	inner raft.WithPreVote
}

// transport wraps the node's transport.
func (p *probation) transport(inner raft.Transport) raft.Transport {
	g := &guard{Transport: inner, p: p, calls: make(chan raft.RPC), done: make(chan struct{})}
	p.guard = g
	go g.run()
	if pv, ok := inner.(raft.WithPreVote); ok {
		return guardPreVote{g, pv}
	}
	return g
}

// run hands calls on until the transport closes.
func (g *guard) run() {
	for {
		select {
		case rpc := <-g.Transport.Consumer():
			if err := g.p.refuses(election(rpc.Command)); err != nil {
				rpc.Respond(refusal(rpc.Command), err)
				continue
			}
			select {
			case g.calls <- rpc:
			case <-g.done:
				rpc.Respond(refusal(rpc.Command), raft.ErrTransportShutdown)
				return
			}
		case <-g.done:
			return
		}
	}
}

// election reports whether a call is part of an election.
func election(command any) bool {
	switch command.(type) {
	case *raft.RequestVoteRequest, *raft.RequestPreVoteRequest, *raft.TimeoutNowRequest:
		return true
	}
	return false
}

// refusal is an answer that promises nothing.
func refusal(command any) any {
	switch command.(type) {
	case *raft.RequestVoteRequest:
		return &raft.RequestVoteResponse{}
	case *raft.RequestPreVoteRequest:
		return &raft.RequestPreVoteResponse{}
	case *raft.TimeoutNowRequest:
		return &raft.TimeoutNowResponse{}
	case *raft.InstallSnapshotRequest:
		return &raft.InstallSnapshotResponse{}
	}
	return &raft.AppendEntriesResponse{}
}

// Consumer implements raft.Transport.
func (g *guard) Consumer() <-chan raft.RPC { return g.calls }

// SetHeartbeatHandler implements raft.Transport.
func (g *guard) SetHeartbeatHandler(handle func(raft.RPC)) {
	if handle == nil {
		g.Transport.SetHeartbeatHandler(nil)
		return
	}
	g.Transport.SetHeartbeatHandler(func(rpc raft.RPC) {
		if err := g.p.refuses(false); err != nil {
			rpc.Respond(refusal(rpc.Command), err)
			return
		}
		handle(rpc)
	})
}

// RequestVote implements raft.Transport.
func (g *guard) RequestVote(id raft.ServerID, to raft.ServerAddress, req *raft.RequestVoteRequest, resp *raft.RequestVoteResponse) error {
	if err := g.p.refuses(true); err != nil {
		return err
	}
	return g.Transport.RequestVote(id, to, req, resp)
}

// RequestPreVote implements raft.WithPreVote.
func (g guardPreVote) RequestPreVote(id raft.ServerID, to raft.ServerAddress, req *raft.RequestPreVoteRequest, resp *raft.RequestPreVoteResponse) error {
	if err := g.p.refuses(true); err != nil {
		return err
	}
	return g.inner.RequestPreVote(id, to, req, resp)
}

// AppendEntries implements raft.Transport.
func (g *guard) AppendEntries(id raft.ServerID, to raft.ServerAddress, req *raft.AppendEntriesRequest, resp *raft.AppendEntriesResponse) error {
	if err := g.p.refuses(false); err != nil {
		return err
	}
	return g.Transport.AppendEntries(id, to, req, resp)
}

// InstallSnapshot implements raft.Transport.
func (g *guard) InstallSnapshot(id raft.ServerID, to raft.ServerAddress, req *raft.InstallSnapshotRequest, resp *raft.InstallSnapshotResponse, data io.Reader) error {
	if err := g.p.refuses(false); err != nil {
		return err
	}
	return g.Transport.InstallSnapshot(id, to, req, resp, data)
}

// Close implements raft.WithClose.
func (g *guard) Close() error {
	g.once.Do(func() { close(g.done) })
	if c, ok := g.Transport.(raft.WithClose); ok {
		return c.Close()
	}
	return nil
}
