package main

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/kms/wire"
)

const someCluster = "00112233445566778899aabbccddeeff"

func shown(size uint64, root byte) wire.Status {
	return wire.Status{Cluster: someCluster, Lineage: someCluster, LogSize: size, LogRoot: []byte{root}, Node: "fr-1", Time: time.Unix(1, 0)}
}

// TestMemory: what was seen is kept, and a cluster with less or something else is refused.
func TestMemory(t *testing.T) {
	t.Setenv(memoryEnv, t.TempDir())
	m, known, err := recall(someCluster)
	if err != nil || known {
		t.Fatal(known, err)
	}
	if err := m.seen(shown(10, 1)).save(); err != nil {
		t.Fatal(err)
	}
	if m, known, err = recall(someCluster); err != nil || !known || m.LogSize != 10 {
		t.Fatal(m, known, err)
	}
	other, later := shown(20, 2), shown(3, 3)
	other.Lineage, other.Epoch = strings.Repeat("f", 32), 0
	later.Lineage, later.Epoch = strings.Repeat("e", 32), 1
	for name, c := range map[string]struct {
		s    wire.Status
		want string
	}{
		"the same":                  {shown(10, 1), ""},
		"more":                      {shown(11, 2), ""},
		"less":                      {shown(9, 1), "was set back"},
		"another log":               {shown(10, 2), "another log"},
		"another history":           {other, "given up"},
		"a recovery not yet agreed": {later, "memory accept"},
	} {
		err := m.sameHistory(c.s)
		if err == nil {
			err = m.compare(c.s)
		}
		text := ""
		var e *kms.Error
		if errors.As(err, &e) {
			text = e.Msg + e.Fix
		}
		if (c.want == "") != (err == nil) || !strings.Contains(text, c.want) || err != nil && !errors.Is(err, kms.Conflict) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := m.seen(shown(5, 5)); got.LogSize != 10 {
		t.Errorf("a node that lags made it forget: %d", got.LogSize)
	}
	if _, _, err := recall("../" + someCluster); !errors.Is(err, kms.Invalid) {
		t.Errorf("a cluster of that name: %v", err)
	}
}

// TestContradicts: a backup with a log as long as the one seen, but another, or without a
// vote that this person has cast, is refused; an older one is not.
func TestContradicts(t *testing.T) {
	t.Setenv(memoryEnv, t.TempDir())
	w := statetest.New(t, statetest.Options{})
	a := &app{}
	check := func(what string, st *state.State, refused bool) {
		t.Helper()
		if err := a.contradicts(st); (kms.KindOf(err) == kms.Conflict) != refused || !refused && err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	w.Do("node-fr-1", state.Tick{})
	older := w.State()
	check("a backup of a cluster that was never seen", older, false)
	without := older // the same history without the vote
	for range 3 {
		without, _ = without.Apply(without.Index()+1, []byte("noise"))
	}
	id := w.Propose(kms.ActionCustodian, "custodian/fr-1", approval.CustodianParams{Custodian: approval.Custodian{ID: "fr-1", Site: "fr", Revoked: true}})
	w.Approve(id, "de-1")
	now := w.State()
	m := memory{Format: memoryFormat, Cluster: now.Cluster(), Lineage: now.Lineage(), LogSize: now.LogSize(), LogRoot: now.LogRoot(),
		Votes: []ballot{{Proposal: id, Custodian: "de-1", Verdict: "approve", Lineage: now.Lineage()}}}
	if err := m.save(); err != nil {
		t.Fatal(err)
	}
	w.Do("node-fr-1", state.Tick{})
	check("the same", now, false)
	check("a later one", w.State(), false)
	check("an older one", older, false)
	check("a longer log without the vote", without, true)
	m.LogRoot = append([]byte{}, make([]byte, 32)...)
	m.Votes = nil
	if err := m.save(); err != nil {
		t.Fatal(err)
	}
	check("another log of that length", now, true)
}
