package cluster

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

func server(id string, s raft.ServerSuffrage) raft.Server {
	return raft.Server{ID: raft.ServerID(id), Address: raft.ServerAddress(id), Suffrage: s}
}

func TestCheckMembers(t *testing.T) {
	w := statetest.New(t, statetest.Options{})
	de, fr, jp := server("node-de-1", raft.Voter), server("node-fr-1", raft.Voter), server("node-jp-1", raft.Voter)
	joined := server("node-de-2", raft.Nonvoter)
	genesis := w.State()
	w.Announce()
	_, params := w.JoinParams("node-de-2", "de", false)
	w.Carry(kms.ActionNode, approval.NodeTarget("node-de-2"), params)
	pending := w.State()
	w.ConfirmMembers()
	confirmed := w.State()
	for name, c := range map[string]struct {
		st       *state.State
		have     []raft.Server
		log      bool // acceptable in the log
		snapshot bool // acceptable with a snapshot
	}{
		"the genesis":                     {genesis, []raft.Server{de, fr, jp}, true, true},
		"in another order":                {genesis, []raft.Server{jp, de, fr}, true, true},
		"one removed":                     {genesis, []raft.Server{de, fr}, false, false},
		"the leader alone":                {genesis, []raft.Server{de}, false, false},
		"one more":                        {genesis, []raft.Server{de, fr, jp, joined}, false, false},
		"one demoted":                     {genesis, []raft.Server{de, fr, server("node-jp-1", raft.Nonvoter)}, false, false},
		"one twice":                       {genesis, []raft.Server{de, fr, fr}, false, false},
		"none":                            {genesis, nil, false, false},
		"before the change":               {pending, []raft.Server{de, fr, jp}, true, true},
		"after the change":                {pending, []raft.Server{de, fr, jp, joined}, true, true},
		"another change":                  {pending, []raft.Server{de, fr, jp, server("node-xx-1", raft.Nonvoter)}, false, false},
		"more than the change":            {pending, []raft.Server{de, fr, jp, server("node-de-2", raft.Voter)}, false, false},
		"confirmed":                       {confirmed, []raft.Server{de, fr, jp, joined}, true, true},
		"undone after the confirmation":   {confirmed, []raft.Server{de, fr, jp}, false, true},
		"another after the confirmation":  {confirmed, []raft.Server{de, fr}, false, false},
		"promoted after the confirmation": {confirmed, []raft.Server{de, fr, jp, server("node-de-2", raft.Voter)}, false, false},
	} {
		have := raft.Configuration{Servers: c.have}
		err := checkMembers(c.st, have)
		if (err == nil) != c.log {
			t.Errorf("%s in the log: %v", name, err)
		}
		if err != nil && !strings.Contains(err.Error(), "custodians have approved") {
			t.Error(err)
		}
		if err := checkSnapshotMembers(c.st, have); (err == nil) != c.snapshot {
			t.Errorf("%s in a snapshot: %v", name, err)
		}
	}
}

// Every step leads from one acceptable list to another.
func TestNextChange(t *testing.T) {
	w := statetest.New(t, statetest.Options{})
	w.Advance(time.Second)
	de, fr, jp := server("node-de-1", raft.Voter), server("node-fr-1", raft.Voter), server("node-jp-1", raft.Voter)
	joined, promoted := server("node-de-2", raft.Nonvoter), server("node-de-2", raft.Voter)
	old := []raft.Server{de, fr, jp}
	check := func(name string, have []raft.Server, want change, done, fails bool) {
		t.Helper()
		got, ok, err := nextChange(w.State(), raft.Configuration{Servers: have})
		if got != want || ok != done || (err != nil) != fails {
			t.Errorf("%s: %+v, done %v, %v", name, got, ok, err)
		}
	}
	check("nothing", old, change{}, true, false)
	w.Announce()
	_, params := w.JoinParams("node-de-2", "de", false)
	w.Carry(kms.ActionNode, approval.NodeTarget("node-de-2"), params)
	check("join", old, change{raft.AddNonvoter, "node-de-2"}, false, false)
	check("joined", append(slices.Clone(old), joined), change{}, true, false)
	w.ConfirmMembers()
	check("confirmed too early", old, change{raft.AddNonvoter, "node-de-2"}, false, false)
	w.Reseal("node-de-2")
	w.Do("node-de-2", w.AdoptCommand("node-de-2"))
	w.Announce()
	w.Do("node-de-2", state.Tick{})
	w.Carry(kms.ActionNode, approval.NodeTarget("node-de-2"), approval.NodeParams{Change: approval.NodePromote})
	check("promote", append(slices.Clone(old), joined), change{raft.AddVoter, "node-de-2"}, false, false)
	check("too far", []raft.Server{de, fr}, change{}, false, true)
	w.ConfirmMembers()
	w.Carry(kms.ActionNode, approval.NodeTarget("node-de-1"), approval.NodeParams{Change: approval.NodeRemove})
	check("remove", append(slices.Clone(old), promoted), change{raft.RemoveServer, "node-de-1"}, false, false)
	check("a change behind", append(slices.Clone(old), joined), change{raft.AddVoter, "node-de-2"}, false, false)
	check("removed", []raft.Server{fr, jp, promoted}, change{}, true, false)
}

// A node that finds a list in its log that the state does not call for goes no further.
func TestForgedListHalts(t *testing.T) {
	w := statetest.New(t, statetest.Options{})
	var halted error
	m := &machine{onHalt: func(err error) { halted = err }}
	m.state.Store(w.State())
	m.StoreConfiguration(1, servers(w.State().Members()))
	if halted != nil || !m.hasMembers(w.State()) {
		t.Fatalf("the right list: %v", halted)
	}
	m.StoreConfiguration(9, raft.Configuration{Servers: []raft.Server{server("node-de-1", raft.Voter)}})
	if halted == nil || !strings.Contains(halted.Error(), "halted at log entry 9") {
		t.Fatalf("got %v", halted)
	}
	if _, err := m.Snapshot(); err == nil {
		t.Error("it takes a snapshot")
	}
}
