package cluster

import (
	"errors"
	"testing"

	"github.com/hashicorp/raft"
)

// entries returns a log from index first on with the terms.
func entries(t *testing.T, first uint64, terms ...uint64) *raft.InmemStore {
	t.Helper()
	s := raft.NewInmemStore()
	for i, term := range terms {
		if err := s.StoreLog(&raft.Log{Index: first + uint64(i), Term: term}); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

// What a log has of a former leader goes when the leader's snapshot replaces it, and
// nothing else does.
func TestSnapshotOverAStaleLog(t *testing.T) {
	for name, c := range map[string]struct {
		first   uint64
		terms   []uint64
		at      uint64 // the snapshot's end, of term 3
		success bool   // Raft takes it
		left    uint64 // the end of the log afterwards
		halts   bool
	}{
		"the log ends before":              {1, []uint64{1, 1, 2}, 9, true, 0, false},
		"the snapshot is not taken":        {1, []uint64{1, 1, 2}, 9, false, 3, false},
		"the log has the entry and more":   {1, []uint64{1, 3, 3}, 2, true, 3, false},
		"another entry stands at its end":  {1, []uint64{1, 2}, 2, true, 0, true},
		"another entry and more":           {1, []uint64{1, 2, 2, 2}, 2, true, 0, true},
		"the log begins after":             {5, []uint64{3, 3}, 4, true, 6, false},
		"there is no log":                  {1, nil, 4, true, 0, false},
		"another entry, but it is refused": {1, []uint64{1, 2}, 2, false, 2, false},
	} {
		t.Run(name, func(t *testing.T) {
			logs := entries(t, c.first, c.terms...)
			var halted error
			_, inner := raft.NewInmemTransport("a")
			tidied := newTidy(inner, &held{logs, raft.NewInmemSnapshotStore(), func() uint64 { return 0 }, func() uint64 { return 3 }}, func(err error) { halted = err })
			defer tidied.(raft.WithClose).Close()
			_, peer := raft.NewInmemTransport("b")
			peer.Connect("a", inner)
			go func() {
				rpc := <-tidied.Consumer()
				rpc.Respond(&raft.InstallSnapshotResponse{Success: c.success}, nil)
			}()
			var resp raft.InstallSnapshotResponse
			err := peer.InstallSnapshot("a", "a", &raft.InstallSnapshotRequest{LastLogIndex: c.at, LastLogTerm: 3}, &resp, nil)
			last, _ := logs.LastIndex()
			if last != c.left || errors.Is(halted, ErrStaleLog) != c.halts || (err != nil) != c.halts || err == nil && resp.Success != c.success {
				t.Errorf("the log ends at %d, halted %v, %+v, %v", last, halted, resp, err)
			}
		})
	}
}
