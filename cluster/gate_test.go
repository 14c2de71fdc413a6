package cluster

import (
	"log/slog"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// behindGate is Raft behind a gate: it accepts every request and notes it.
type behindGate struct {
	state atomic.Pointer[state.State]
	logs  *raft.InmemStore
	got   []*raft.AppendEntriesRequest
	apply func(*raft.AppendEntriesRequest) // optional
}

// send sends a request through a gate and returns the answer.
func (b *behindGate) send(t *testing.T, req *raft.AppendEntriesRequest) *raft.AppendEntriesResponse {
	t.Helper()
	b.got = nil
	_, inner := raft.NewInmemTransport("")
	g := newGate(inner, b.state.Load, b.logs, 50*time.Millisecond, slog.New(slog.DiscardHandler), &contacts{})
	served := make(chan struct{})
	stop := make(chan struct{})
	go func() {
		defer close(served)
		for {
			select {
			case rpc := <-g.Consumer():
				r := rpc.Command.(*raft.AppendEntriesRequest)
				b.got = append(b.got, r)
				last := r.PrevLogEntry + uint64(len(r.Entries))
				if b.apply != nil {
					b.apply(r)
				}
				rpc.Respond(&raft.AppendEntriesResponse{Success: true, LastLog: last}, nil)
			case <-stop:
				return
			}
		}
	}()
	_, other := raft.NewInmemTransport("")
	other.Connect(inner.LocalAddr(), inner)
	var resp raft.AppendEntriesResponse
	if err := other.AppendEntries("", inner.LocalAddr(), req, &resp); err != nil {
		t.Fatal(err)
	}
	close(stop)
	<-served
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	return &resp
}

func listEntry(index uint64, l []state.Member) *raft.Log {
	return &raft.Log{Index: index, Term: 2, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(servers(l))}
}

func TestGate(t *testing.T) {
	w := statetest.New(t, statetest.Options{})
	old := w.State()
	w.Announce()
	_, params := w.JoinParams("node-de-2", "de", false)
	w.Carry(kms.ActionNode, approval.NodeTarget("node-de-2"), params)
	joining := w.State()
	w.ConfirmMembers()
	command := func(i uint64) *raft.Log { return &raft.Log{Index: i, Term: 2, Type: raft.LogCommand} }
	list := func(i uint64) *raft.Log { return listEntry(i, joining.Members()) }
	request := func(entries ...*raft.Log) *raft.AppendEntriesRequest {
		return &raft.AppendEntriesRequest{PrevLogEntry: entries[0].Index - 1, LeaderCommitIndex: 100, Entries: entries}
	}
	b := &behindGate{logs: raft.NewInmemStore()}
	if err := b.logs.StoreLog(command(1)); err != nil {
		t.Fatal(err)
	}

	b.state.Store(old)
	if resp := b.send(t, request(command(5), command(6))); !resp.Success || len(b.got) != 1 || b.got[0].LeaderCommitIndex != 100 {
		t.Errorf("without a list: %+v, %d requests", resp, len(b.got))
	}

	// A list that nobody has approved: only what comes before it gets through, and no
	// commit index beyond that.
	resp := b.send(t, request(command(5), command(6), list(7), command(8)))
	if resp.Success || resp.LastLog != 6 || len(b.got) != 1 || len(b.got[0].Entries) != 2 || b.got[0].LeaderCommitIndex != 6 {
		t.Errorf("a forged list: %+v, %+v", resp, b.got)
	}
	resp = b.send(t, request(list(7)))
	if resp.Success || len(b.got) != 1 || len(b.got[0].Entries) != 0 || b.got[0].LeaderCommitIndex != 6 {
		t.Errorf("the forged list alone: %+v, %+v", resp, b.got)
	}

	// The state calls for it once it has applied what came before.
	b.apply = func(r *raft.AppendEntriesRequest) {
		if r.LeaderCommitIndex >= 6 {
			b.state.Store(joining)
		}
	}
	resp = b.send(t, request(command(5), command(6), list(7), command(8)))
	if !resp.Success || resp.LastLog != 8 || len(b.got) != 2 || len(b.got[1].Entries) != 4 || b.got[1].LeaderCommitIndex != 100 {
		t.Errorf("the approved list: %+v, %+v", resp, b.got)
	}

	// Two lists in one request: the second must wait for what is between them.
	b.state.Store(old)
	resp = b.send(t, request(listEntry(5, old.Members()), command(6), list(7), command(8)))
	if !resp.Success || resp.LastLog != 8 {
		t.Errorf("two lists: %+v, %+v", resp, b.got)
	}
	for i, r := range b.got {
		if at := firstList(r.Entries); at >= 0 && firstList(r.Entries[at+1:]) >= 0 {
			t.Errorf("request %d of %d has both lists", i, len(b.got))
		}
	}

	// What is in the log already was accepted, whatever the state has become.
	b.apply = nil
	b.state.Store(old)
	if err := b.logs.StoreLog(list(7)); err != nil {
		t.Fatal(err)
	}
	if resp := b.send(t, request(list(7), command(8))); !resp.Success || resp.LastLog != 8 {
		t.Errorf("a list that is in the log: %+v", resp)
	}
	other := list(7)
	other.Term = 3
	if resp := b.send(t, request(other, command(8))); resp.Success {
		t.Errorf("another leader's at the same place: %+v", resp)
	}
}
