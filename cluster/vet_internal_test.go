package cluster

import (
	"log/slog"
	"math"
	"testing"

	"github.com/hashicorp/raft"
)

// The checks of vet on snapshots and terms.
func TestVet(t *testing.T) {
	own := uint64(7)
	v := &vet{term: func() uint64 { return own }, last: func() uint64 { return 100 }, log: slog.New(slog.DiscardHandler)}
	good := raft.InstallSnapshotRequest{SnapshotVersion: 1, Term: 8, LastLogIndex: 120, LastLogTerm: 7, ConfigurationIndex: 90,
		Configuration: raft.EncodeConfiguration(raft.Configuration{Servers: []raft.Server{{ID: "a"}}}), Size: 1}
	if err := v.check(&good); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(*raft.InstallSnapshotRequest){
		"a list that does not decode": func(r *raft.InstallSnapshotRequest) { r.Configuration = []byte("nonsense") },
		"no list":                     func(r *raft.InstallSnapshotRequest) { r.Configuration = nil },
		"the first version":           func(r *raft.InstallSnapshotRequest) { r.SnapshotVersion = 0 },
		"a later version":             func(r *raft.InstallSnapshotRequest) { r.SnapshotVersion = 2 },
		"an end of a later term":      func(r *raft.InstallSnapshotRequest) { r.LastLogTerm = 9 },
		"an end far ahead":            func(r *raft.InstallSnapshotRequest) { r.LastLogIndex = 1 << 40 },
		"members from after its end":  func(r *raft.InstallSnapshotRequest) { r.ConfigurationIndex = 121 },
		"a negative size":             func(r *raft.InstallSnapshotRequest) { r.Size = -1 },
		"a term far ahead":            func(r *raft.InstallSnapshotRequest) { r.Term = math.MaxUint64 },
	} {
		r := good
		change(&r)
		if err := v.check(&r); err == nil {
			t.Errorf("a snapshot with %s is taken", name)
		}
	}
	for _, term := range []uint64{1, 7, 8, 7 + maxTermStep} {
		if err := v.check(&raft.RequestVoteRequest{Term: term}); err != nil {
			t.Errorf("term %d: %v", term, err)
		}
	}
	if v.check(&raft.RequestPreVoteRequest{Term: 8 + maxTermStep}) == nil || v.check(&raft.RequestVoteRequest{Term: math.MaxUint64}) == nil || v.check(nil) == nil {
		t.Error("a term far ahead, or no message, is taken")
	}
	own = 0 // a node that joins knows no term yet
	if err := v.check(&raft.AppendEntriesRequest{Term: 3 << 32}); err != nil {
		t.Error(err)
	}
}
