package cluster

import (
	"io"

	"github.com/hashicorp/raft"
)

// held answers for Raft what concerns the committed part of the log, which agrees with that
// of every leader there will be. Raft looks the entry before new ones up in the log, and refuses them if a
// snapshot has taken its place; and it goes back to a leader's snapshot that ends before its own
// state. A node that the leader takes to be further behind than it is, because answers
// were lost, would so be sent the same snapshot again and again, until the leader makes another.
type held struct {
	logs      raft.LogStore
	snapshots raft.SnapshotStore
	committed func() uint64 // index of the last entry known to be committed
	term      func() uint64 // this node's
}

// entries returns a call without what this node's log begins after. It takes no more for committed
// than the call shows to be the leader's: the end of the log may be a former leader's (Raft
// section 5.3, AppendEntries, 5; hashicorp/raft goes by the end of the log).
func (h *held) entries(req *raft.AppendEntriesRequest) *raft.AppendEntriesRequest {
	out := *req
	if at, term := h.begin(); out.PrevLogEntry < at {
		n := min(at-out.PrevLogEntry, uint64(len(out.Entries)))
		if out.PrevLogEntry+n == at {
			term = out.Entries[n-1].Term // Raft compares it with what it holds
		}
		out.PrevLogEntry, out.PrevLogTerm, out.Entries = at, term, out.Entries[n:]
	}
	out.LeaderCommitIndex = min(out.LeaderCommitIndex, out.PrevLogEntry+uint64(len(out.Entries)))
	return &out
}

// begin returns the index and the term of a committed entry that Raft can compare with a leader's,
// with none before it in the log; 0 if the log begins with its first entry.
func (h *held) begin() (index, term uint64) {
	first, err := h.logs.FirstIndex()
	if err != nil || first == 1 {
		return 0, 0
	}
	var l raft.Log
	if first != 0 && first <= h.committed() && h.logs.GetLog(first, &l) == nil {
		return l.Index, l.Term
	}
	metas, err := h.snapshots.List()
	if err != nil || len(metas) == 0 {
		return 0, 0
	}
	return metas[0].Index, metas[0].Term
}

// snapshot answers for a snapshot that ends within the committed part, false if it does not.
func (h *held) snapshot(rpc raft.RPC, req *raft.InstallSnapshotRequest) (*raft.InstallSnapshotResponse, bool) {
	term := h.term()
	if req.Term != term || req.LastLogIndex > h.committed() {
		return nil, false
	}
	if rpc.Reader != nil {
		_, _ = io.Copy(io.Discard, rpc.Reader) // what follows on the connection is the next call
	}
	return &raft.InstallSnapshotResponse{RPCHeader: raft.RPCHeader{ProtocolVersion: req.ProtocolVersion}, Term: term, Success: true}, true
}
