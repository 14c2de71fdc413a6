package cluster

import (
	"strings"
	"testing"

	"github.com/hashicorp/raft"
)

// A node that has committed what a leader sends answers for it whatever its log still holds,
// and takes no entry for committed that the message does not show.
func TestHeld(t *testing.T) {
	// The log ends with entry 8; up to 6 it is committed, and the snapshot ends with 4.
	log := func(first uint64) *raft.InmemStore {
		terms := []uint64{1, 1, 1, 2, 2, 2, 3, 3}
		return entries(t, first, terms[first-1:]...)
	}
	empty := raft.NewInmemStore()
	for name, c := range map[string]struct {
		logs       *raft.InmemStore
		prev, n    uint64 // the entry before those sent, and how many are sent
		wantPrev   uint64
		wantTerm   uint64
		wantN      uint64
		wantCommit uint64 // the leader names 8
	}{
		"the log is whole":                          {log(1), 2, 3, 2, 1, 3, 5},
		"all of a whole log":                        {log(1), 0, 8, 0, 0, 8, 8},
		"nothing to show":                           {log(1), 0, 0, 0, 0, 0, 0},
		"within the log":                            {log(3), 3, 2, 3, 1, 2, 5},
		"from before the log":                       {log(3), 1, 4, 3, 1, 2, 5},
		"up to where the log begins":                {log(3), 1, 2, 3, 1, 0, 3},
		"not as far as the log":                     {log(5), 1, 2, 5, 2, 0, 5},
		"the log begins with what is not committed": {log(7), 2, 4, 4, 2, 2, 6},
		"there is only the snapshot":                {empty, 2, 4, 4, 2, 2, 6},
		"after the snapshot":                        {empty, 4, 2, 4, 2, 2, 6},
	} {
		t.Run(name, func(t *testing.T) {
			h := &held{c.logs, snapshotAt(t, 4, 2), func() uint64 { return 6 }, func() uint64 { return 3 }}
			terms := []uint64{0, 1, 1, 1, 2, 2, 2, 3, 3}
			req := &raft.AppendEntriesRequest{Term: 3, PrevLogEntry: c.prev, PrevLogTerm: terms[c.prev], LeaderCommitIndex: 8}
			for i := range c.n {
				req.Entries = append(req.Entries, &raft.Log{Index: c.prev + i + 1, Term: terms[c.prev+i+1]})
			}
			got := h.entries(req)
			if got.PrevLogEntry != c.wantPrev || got.PrevLogTerm != c.wantTerm || uint64(len(got.Entries)) != c.wantN || got.LeaderCommitIndex != c.wantCommit {
				t.Errorf("entry %d of term %d, then %d, committed %d", got.PrevLogEntry, got.PrevLogTerm, len(got.Entries), got.LeaderCommitIndex)
			}
			if len(got.Entries) > 0 && got.Entries[0].Index != got.PrevLogEntry+1 {
				t.Errorf("entry %d follows entry %d", got.Entries[0].Index, got.PrevLogEntry)
			}
			if uint64(len(req.Entries)) != c.n {
				t.Error("the call itself was changed")
			}
		})
	}
	for name, c := range map[string]struct {
		term, at uint64
		want     bool
	}{
		"within what is committed": {3, 6, true},
		"beyond it":                {3, 7, false},
		"of a former leader":       {2, 5, false},
		"of a later leader":        {4, 5, false}, // Raft has to take its term first
	} {
		t.Run("a snapshot "+name, func(t *testing.T) {
			h := &held{log(3), raft.NewInmemSnapshotStore(), func() uint64 { return 6 }, func() uint64 { return 3 }}
			stream := strings.NewReader("content")
			resp, ok := h.snapshot(raft.RPC{Reader: stream}, &raft.InstallSnapshotRequest{Term: c.term, LastLogIndex: c.at})
			if ok != c.want || ok && (!resp.Success || resp.Term != 3) || (stream.Len() == 0) != ok {
				t.Errorf("answered %v, %+v, with %d bytes left to read", ok, resp, stream.Len())
			}
		})
	}
}

// snapshotAt returns a store with a snapshot that ends with an entry.
func snapshotAt(t *testing.T, index, term uint64) raft.SnapshotStore {
	t.Helper()
	s := raft.NewInmemSnapshotStore()
	sink, err := s.Create(raft.SnapshotVersionMax, index, term, raft.Configuration{}, 1, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := sink.Close(); err != nil {
		t.Fatal(err)
	}
	return s
}
