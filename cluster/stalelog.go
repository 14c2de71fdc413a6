package cluster

import (
	"errors"
	"fmt"
	"sync"

	"github.com/hashicorp/raft"
)

// ErrStaleLog is in the chain of the reason with which a node halts when a snapshot from
// the leader has replaced a log that went further, with entries that were never
// committed. Raft still has the end of that log in memory and would vote by it. Opened again
// the node goes on.
var ErrStaleLog = errors.New("cluster: a snapshot has replaced the end of the node's log; it must start again")

// tidy is a transport that clears away what Raft leaves when it takes a snapshot from the
// leader: the entries of a former leader stay in the log below or at the snapshot's end
// (hashicorp/raft issue 697). At its end they make Raft refuse all that follows, for good;
// below it this node, leading later, would send them to others as if they were committed.
type tidy struct {
	raft.Transport
	logs  raft.LogStore
	held  *held
	halt  func(error)
	calls chan raft.RPC // to Raft
	done  chan struct{}
	once  sync.Once

	writing chan struct{} // held by the one call that writes; no mutex, for whoever waits waits for a disk
}

// tidyPreVote is tidy over a transport with pre-votes.
type tidyPreVote struct {
	*tidy
	raft.WithPreVote
}

func newTidy(inner raft.Transport, held *held, halt func(error)) raft.Transport {
	t := &tidy{Transport: inner, logs: held.logs, held: held, halt: halt, calls: make(chan raft.RPC), done: make(chan struct{}), writing: make(chan struct{}, 1)}
	go t.run()
	if pv, ok := inner.(raft.WithPreVote); ok {
		return tidyPreVote{t, pv}
	}
	return t
}

// Consumer implements raft.Transport.
func (t *tidy) Consumer() <-chan raft.RPC { return t.calls }

// Close implements raft.WithClose.
func (t *tidy) Close() error {
	t.once.Do(func() { close(t.done) })
	if c, ok := t.Transport.(raft.WithClose); ok {
		return c.Close()
	}
	return nil
}

// run hands calls on until the transport closes.
func (t *tidy) run() {
	for {
		select {
		case rpc := <-t.Transport.Consumer():
			switch rpc.Command.(type) {
			case *raft.InstallSnapshotRequest, *raft.AppendEntriesRequest:
				go t.write(rpc) // votes do not wait for it
				continue
			}
			select {
			case t.calls <- rpc:
			case <-t.done:
				rpc.Respond(refusal(rpc.Command), raft.ErrTransportShutdown)
				return
			}
		case <-t.done:
			return
		}
	}
}

// write hands on what goes into the log, one call at a time: when a snapshot comes, what came before
// it is in the log, however slow the disk is.
func (t *tidy) write(rpc raft.RPC) {
	t.writing <- struct{}{}
	defer func() { <-t.writing }()
	switch req := rpc.Command.(type) {
	case *raft.InstallSnapshotRequest:
		rpc.Respond(t.install(rpc, req))
		return
	case *raft.AppendEntriesRequest:
		rpc.Command = t.held.entries(req)
	}
	if r, ok := t.do(rpc); ok {
		rpc.Respond(r.Response, r.Error)
		return
	}
	rpc.Respond(refusal(rpc.Command), raft.ErrTransportShutdown)
}

// do hands a call to Raft and returns its answer, false when the transport closes.
func (t *tidy) do(rpc raft.RPC) (r raft.RPCResponse, ok bool) {
	answer := make(chan raft.RPCResponse, 1)
	select {
	case t.calls <- raft.RPC{Command: rpc.Command, Reader: rpc.Reader, RespChan: answer}:
	case <-t.done:
		return r, false
	}
	select {
	case r = <-answer:
		return r, true
	case <-t.done:
		return r, false
	}
}

// install has Raft take a snapshot that goes further than this node, and clears the log if it does
// not agree with it.
func (t *tidy) install(rpc raft.RPC, req *raft.InstallSnapshotRequest) (any, error) {
	if resp, ok := t.held.snapshot(rpc, req); ok {
		return resp, nil
	}
	refused := &raft.InstallSnapshotResponse{RPCHeader: raft.RPCHeader{ProtocolVersion: req.ProtocolVersion}}
	agrees, last, err := logAgrees(t.logs, req.LastLogIndex, req.LastLogTerm)
	if err != nil {
		return refused, err
	}
	r, ok := t.do(rpc)
	if !ok {
		return refused, raft.ErrTransportShutdown
	}
	resp, ok := r.Response.(*raft.InstallSnapshotResponse)
	if !ok {
		return refused, r.Error
	}
	if r.Error != nil || !resp.Success || agrees {
		return resp, r.Error
	}
	if err := clearLog(t.logs); err != nil {
		t.halt(fmt.Errorf("the log cannot be cleared: %w", errors.Join(ErrStaleLog, err)))
		return refused, err
	}
	if last >= req.LastLogIndex {
		t.halt(ErrStaleLog)
		return refused, ErrStaleLog
	}
	return resp, nil
}

// logAgrees reports whether the log is known to agree with a snapshot that ends with
// the entry at an index, of a term: then it holds that very entry, or begins after it.
// last is the end of the log.
func logAgrees(logs raft.LogStore, index, term uint64) (agrees bool, last uint64, err error) {
	first, err := logs.FirstIndex()
	if err != nil {
		return false, 0, err
	}
	if last, err = logs.LastIndex(); err != nil {
		return false, 0, err
	}
	switch {
	case last == 0 || index < first:
		return true, last, nil
	case index > last:
		return false, last, nil
	}
	var l raft.Log
	if err := logs.GetLog(index, &l); err != nil {
		return false, last, err
	}
	return l.Term == term, last, nil
}

func clearLog(logs raft.LogStore) error {
	first, err := logs.FirstIndex()
	if err != nil {
		return err
	}
	last, err := logs.LastIndex()
	if err != nil || last == 0 {
		return err
	}
	return logs.DeleteRange(first, last)
}

// dropConflict removes what of the log disagrees with the latest snapshot: the node ended
// between taking it from the leader and clearing the log.
func dropConflict(logs raft.LogStore, snapshots raft.SnapshotStore) error {
	metas, err := snapshots.List()
	if err != nil || len(metas) == 0 {
		return err
	}
	at := metas[0].Index
	agrees, last, err := logAgrees(logs, at, metas[0].Term)
	if err != nil || agrees || last < at {
		return err
	}
	return logs.DeleteRange(at, last)
}

// clearBehind clears a log that ends before the snapshot with which Raft has started.
func clearBehind(logs raft.LogStore, r *raft.Raft) error {
	first, err := logs.FirstIndex()
	if err != nil {
		return err
	}
	last, err := logs.LastIndex()
	if err != nil || last == 0 || last >= r.LastIndex() {
		return err
	}
	return logs.DeleteRange(first, last)
}
