package cluster

import (
	"io"
	"log/slog"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms/state"
)

// gate stands between Raft and the transport of a follower. Raft counts with a list of servers
// as soon as it is in the log, committed or not: with a list of its own a hostile
// leader would be its own majority. So the gate lets an entry with a list into the log only
// when the state here, which has applied what came before, calls for it. What it
// refuses it refuses for good, and the leader gets nothing further into this log; a
// leader that has the list for good reason sends it again until the state here has caught up.
type gate struct {
	raft.Transport
	state func() *state.State
	logs  raft.LogStore
	wait  time.Duration // for the state to catch up, before the leader must ask again
	log   *slog.Logger

	contacts *contacts
	calls    chan raft.RPC // to Raft
	done     chan struct{}
	once     sync.Once
	busy     sync.WaitGroup
	said     sync.Once
	waits    sync.Once
}

// gatePreVote is gate over a transport with pre-votes.
type gatePreVote struct {
	*gate
	raft.WithPreVote
}

// gated is a transport that can be closed.
type gated interface {
	raft.Transport
	io.Closer
}

// newGate wraps a transport. Closing it closes the transport.
func newGate(inner raft.Transport, st func() *state.State, logs raft.LogStore, wait time.Duration, log *slog.Logger, c *contacts) gated {
	g := &gate{Transport: inner, state: st, logs: logs, wait: wait, log: log, contacts: c, calls: make(chan raft.RPC), done: make(chan struct{})}
	g.busy.Go(g.run)
	if pv, ok := inner.(raft.WithPreVote); ok {
		return gatePreVote{g, pv}
	}
	return g
}

// Consumer implements raft.Transport.
func (g *gate) Consumer() <-chan raft.RPC { return g.calls }

// Close implements raft.WithClose.
func (g *gate) Close() error {
	g.once.Do(func() { close(g.done) })
	var err error
	if c, ok := g.Transport.(raft.WithClose); ok {
		err = c.Close()
	}
	g.busy.Wait()
	return err
}

// run hands calls on until the transport closes.
func (g *gate) run() {
	for {
		select {
		case rpc := <-g.Transport.Consumer():
			if req, ok := rpc.Command.(*raft.AppendEntriesRequest); ok && firstList(req.Entries) >= 0 {
				g.busy.Go(func() { rpc.Respond(g.appendList(req)) }) // its leader sends nothing else meanwhile
				continue
			}
			if !g.pass(rpc) {
				return
			}
		case <-g.done:
			return
		}
	}
}

// pass gives a call to Raft.
func (g *gate) pass(rpc raft.RPC) bool {
	select {
	case g.calls <- rpc:
		return true
	case <-g.done:
		rpc.Respond(nil, raft.ErrTransportShutdown)
		return false
	}
}

// firstList returns the place of the first list of servers, -1 for none.
func firstList(entries []*raft.Log) int {
	for i, e := range entries {
		if e.Type == raft.LogConfiguration {
			return i
		}
	}
	return -1
}

// appendList answers a request with a list of servers: what comes before the list goes
// to Raft first, so that the state can catch up with it.
func (g *gate) appendList(req *raft.AppendEntriesRequest) (any, error) {
	for {
		at := firstList(req.Entries)
		if at < 0 {
			return g.call(req)
		}
		resp, err := g.call(upTo(req, at))
		if err != nil || !resp.Success {
			return resp, err
		}
		if !g.known(req.Entries[at]) && g.acceptable(req.Entries[at]) != nil {
			return &raft.AppendEntriesResponse{RPCHeader: resp.RPCHeader, Term: resp.Term, LastLog: resp.LastLog, NoRetryBackoff: true}, nil // acceptable has waited
		}
		if firstList(req.Entries[at+1:]) < 0 {
			return g.call(req)
		}
		if resp, err = g.call(upTo(req, at+1)); err != nil || !resp.Success {
			return resp, err
		}
		last := req.Entries[at]
		rest := *req
		rest.PrevLogEntry, rest.PrevLogTerm, rest.Entries = last.Index, last.Term, req.Entries[at+1:]
		req = &rest
	}
}

// upTo returns a request with the first entries only. What is committed beyond them must
// not be taken from it: Raft would commit whatever this log has there.
func upTo(req *raft.AppendEntriesRequest, n int) *raft.AppendEntriesRequest {
	r := *req
	r.Entries = req.Entries[:n]
	r.LeaderCommitIndex = min(req.LeaderCommitIndex, req.PrevLogEntry+uint64(n))
	return &r
}

// known reports whether an entry is in the log, and so has been accepted before: its
// leader did not get the answer. The state may have gone on since.
func (g *gate) known(e *raft.Log) bool {
	first, err := g.logs.FirstIndex()
	if err != nil {
		return false
	}
	var have raft.Log
	return e.Index < first || g.logs.GetLog(e.Index, &have) == nil && have.Term == e.Term
}

// call has Raft answer a request.
func (g *gate) call(req *raft.AppendEntriesRequest) (*raft.AppendEntriesResponse, error) {
	answer := make(chan raft.RPCResponse, 1)
	if !g.pass(raft.RPC{Command: req, RespChan: answer}) {
		return &raft.AppendEntriesResponse{}, raft.ErrTransportShutdown
	}
	select {
	case r := <-answer:
		resp, ok := r.Response.(*raft.AppendEntriesResponse)
		if !ok {
			resp = &raft.AppendEntriesResponse{}
		}
		return resp, r.Error
	case <-g.done:
		return &raft.AppendEntriesResponse{}, raft.ErrTransportShutdown
	}
}

// acceptable says whether the state calls for a list, or soon does.
func (g *gate) acceptable(e *raft.Log) error {
	list := raft.DecodeConfiguration(e.Data)
	limit := time.NewTimer(g.wait)
	defer limit.Stop()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		err := checkMembers(g.state(), list)
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-limit.C:
			if g.behind(e) { // then it is no accusation yet: the leader asks again
				g.waits.Do(func() {
					g.log.Info("a list of servers from the leader waits for the commands before it", "index", e.Index, "term", e.Term)
				})
				return err
			}
			g.said.Do(func() {
				g.log.Error("refused a list of servers from the leader", "index", e.Index, "term", e.Term, "error", err)
			})
			return err
		case <-g.done:
			return err
		}
	}
}

// behind reports whether commands before an entry are still to be applied here, as at a
// node that has just joined and catches up.
func (g *gate) behind(e *raft.Log) bool {
	first, err := g.logs.FirstIndex()
	if err != nil || first == 0 {
		return false
	}
	var l raft.Log
	for i := e.Index - 1; i >= first; i-- {
		if g.logs.GetLog(i, &l) != nil {
			return false
		}
		if l.Type == raft.LogCommand {
			return g.state().Index() < i
		}
	}
	return false
}
