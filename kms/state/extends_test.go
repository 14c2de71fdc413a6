package state_test

import (
	"errors"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// TestExtendsEveryEarlierState holds every state of a history against those before
// it: the later one extends the earlier, never the other way round.
func TestExtendsEveryEarlierState(t *testing.T) {
	w := small(t)
	record := func(id string, revoked bool) approval.CustodianParams {
		c := statetest.Record(id, id[:2], 0, w.Custodian(id))
		c.Revoked = revoked
		return approval.CustodianParams{Custodian: c}
	}
	var destroy, open string
	steps := []func(){
		func() { w.Rotate("europe", "mail") },
		func() { w.Carry(kms.ActionCompromise, mail, approval.VersionParams{Version: 1}) },
		func() {
			destroy = w.Propose(kms.ActionDestroy, mail, approval.VersionParams{Version: 1})
			w.ApproveAll(destroy)
		},
		func() { w.Advance(8 * 24 * time.Hour) },
		func() { w.Execute(destroy) },
		func() { w.Carry(kms.ActionSuspend, mail, nil) },
		func() { w.Carry(kms.ActionResume, mail, nil) },
		func() { open = w.Propose(kms.ActionRotate, mail, nil) },
		func() { w.Vote(open, "de-1", approval.Approve) },
		func() { w.Vote(open, "de-1", approval.Reject) },
		func() {
			w.AddCustodianKey("jp-9")
			w.Carry(kms.ActionCustodian, "custodian/jp-9", record("jp-9", false))
		},
		func() {
			w.Carry(kms.ActionPolicy, "policy/standard", approval.PolicyParams{Rules: statetest.Policies(2)[1].Rules})
		},
		func() { w.CreateHardwareKeyring("vault", "fr", "de") },
		func() { w.CreateKey("vault", "sig", kms.Sign) },
		func() { w.Replace(fr, false) },
		func() { w.Do(de, w.ResealCommand(fr, w.State().Unsealed(fr)[0])) },
		func() { w.Replace(fr, false) },
		func() { w.Do(de, w.ResealCommand(fr, w.State().Unsealed(fr)[0])) },
		func() {
			c := w.State().Adoption(fr)[0]
			w.Do(fr, w.RefuseCommand(fr, state.Pending{Keyring: c.Keyring, Key: c.Key, Version: c.Version}, de))
		},
		func() { w.Replace(fr, false) },
		func() { w.Reseal(fr) },
		func() { w.Do(fr, w.AdoptCommand(fr)) },
		func() { w.Rotate("vault", "sig") },
		func() { w.Rekey(fr) },
		func() { w.Carry(kms.ActionCustodian, "custodian/de-1", record("de-1", true)) },
		func() { w.Apply([]byte("noise")) },
		func() { w.Advance(25 * time.Hour) },
	}
	history := []*state.State{w.State()}
	for _, step := range steps {
		step()
		history = append(history, w.State())
	}
	for i, s := range history {
		for j, old := range history {
			err := s.Extends(old)
			if j <= i && err != nil {
				t.Errorf("state %d does not extend %d: %v", i, j, err)
			}
			if j > i && !errors.Is(err, kms.Conflict) {
				t.Errorf("state %d extends %d: %v", i, j, err)
			}
		}
	}
}

// TestExtendsRefusesThinned takes the last statements away and lets the clock and
// the log go on, as a leader could in a snapshot.
func TestExtendsRefusesThinned(t *testing.T) {
	type step func(w *statetest.World)
	for name, last := range map[string]step{
		"revocation": func(w *statetest.World) {
			gone := statetest.Record("de-1", "de", 0, w.Custodian("de-1"))
			gone.Revoked = true
			w.Carry(kms.ActionCustodian, "custodian/de-1", approval.CustodianParams{Custodian: gone})
		},
		"suspension of a credential": func(w *statetest.World) {
			w.Announce()
			w.SuspendCredential("fr-2", "fr-1")
		},
		"suspension":   func(w *statetest.World) { w.Carry(kms.ActionSuspend, mail, nil) },
		"rejection":    func(w *statetest.World) { w.Vote(w.State().ProposalsOpen()[0].ID, "jp-1", approval.Reject) },
		"new proposal": func(w *statetest.World) { w.Propose(kms.ActionSuspend, mail, nil) },
		"compromise":   func(w *statetest.World) { w.Carry(kms.ActionCompromise, mail, approval.VersionParams{Version: 1}) },
		"another key":  func(w *statetest.World) { w.CreateKey("europe", "later", kms.Encrypt) },
		"another policy": func(w *statetest.World) {
			w.Carry(kms.ActionPolicy, "policy/other", approval.PolicyParams{Rules: statetest.Policies(3)[1].Rules})
		},
		"a new root": func(w *statetest.World) {
			w.Carry(kms.ActionNode, approval.NodeTarget(de), w.NodeParams(de, w.NewRoot(de), false))
		},
		"a copy for it": func(w *statetest.World) { w.Do(fr, w.ResealCommand("node-jp-1", w.State().Unsealed("node-jp-1")[0])) },
		"the refusal of a copy": func(w *statetest.World) {
			w.Do("node-jp-1", w.RefuseCommand("node-jp-1", state.Pending{Keyring: "wide", Version: 1}, fr))
		},
		"its adoption": func(w *statetest.World) {
			w.Reseal("node-jp-1")
			w.Do("node-jp-1", w.AdoptCommand("node-jp-1"))
		},
		"nothing but a nonce": func(w *statetest.World) {
			w.Do("node-fr-1", state.Tick{})
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := small(t)
			w.CreateKeyring("wide", "fr", "de", "jp")
			w.CreateKeyring("more", "fr", "jp")
			w.Replace("node-jp-1", false)
			w.Do(fr, w.ResealCommand("node-jp-1", state.Pending{Keyring: "wide", Version: 1}))
			w.Propose(kms.ActionRotate, mail, nil)
			thinned := w.State()
			last(w)
			known := w.State()
			for range 50 { // as many entries as the other has, and more
				thinned, _ = thinned.Apply(thinned.Index()+1, []byte("noise"))
			}
			if thinned.Index() <= known.Index() || thinned.Clock() < known.Clock() {
				t.Fatal("the thinned state looks older")
			}
			if err := thinned.Extends(known); !errors.Is(err, kms.Conflict) {
				t.Errorf("a state without the %s is taken: %v", name, err)
			}
		})
	}
}
