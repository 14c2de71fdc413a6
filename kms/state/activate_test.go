package state_test

import (
	"slices"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// withActivate is the policy standard with a rule to activate.
func withActivate() approval.PolicyParams {
	rules := slices.Clone(statetest.Policies(3)[1].Rules)
	return approval.PolicyParams{Rules: slices.Insert(rules, 0, approval.Rule{Action: kms.ActionActivate, Approvals: 3, Sites: 3, Lifetime: rules[0].Lifetime})}
}

// TestActivate: a quorum makes a version primary for which a node keeps its receipt
// back; that receipt may still come.
func TestActivate(t *testing.T) {
	w := small(t)
	w.GiveReceipts()
	w.Announce()
	propose := func(version uint32) []byte {
		p := w.Proposal(kms.ActionActivate, mail, approval.VersionParams{Version: version})
		return w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	}
	refused(t, w, kms.Invalid, propose(2)) // the policy has no rule for it
	w.Carry(kms.ActionPolicy, "policy/standard", withActivate())
	refused(t, w, kms.NotFound, propose(2))
	refused(t, w, kms.Conflict, propose(1)) // active
	id := w.Propose(kms.ActionRotate, mail, nil)
	w.ApproveAll(id)
	w.Commit(id)
	refused(t, w, kms.Conflict, propose(2)) // nobody has shown that it can be opened
	w.Do("node-de-1", w.ReceiptCommand("node-de-1", "europe", "mail", 2))

	act := w.Propose(kms.ActionActivate, mail, approval.VersionParams{Version: 2})
	w.Approve(act, "fr-1", "de-1")
	progress(t, w, act, "open")
	w.Approve(act, "jp-1")
	w.Execute(act)
	k, _ := w.State().Key("europe", "mail")
	v, _ := w.State().Version("europe", "mail", 2)
	if k.Primary != 2 || k.Rotated == 0 || v.State != kms.Active || v.Activated == 0 {
		t.Errorf("primary %d, version 2 is %s", k.Primary, v.State)
	}
	restoreBoth(t, w.State())
	w.Do("node-fr-1", w.ReceiptCommand("node-fr-1", "europe", "mail", 2))
	if again, _ := w.State().Version("europe", "mail", 2); again.Activated != v.Activated || len(again.Receipts) != 2 {
		t.Errorf("after the late receipt: %+v", again)
	}
	restoreBoth(t, w.State())
}

// TestActivateRefused: a receipt that comes in time makes the proposal void, and no
// version comes back that a later one has overtaken.
func TestActivateRefused(t *testing.T) {
	w := small(t)
	w.GiveReceipts()
	w.Announce()
	w.Carry(kms.ActionPolicy, "policy/standard", withActivate())
	commit := func() {
		id := w.Propose(kms.ActionRotate, mail, nil)
		w.ApproveAll(id)
		w.Commit(id)
	}
	give := func(node string, version uint32) {
		w.Do(node, w.ReceiptCommand(node, "europe", "mail", version))
	}
	commit()
	give("node-de-1", 2)
	commit()
	give("node-de-1", 3)
	id := w.Propose(kms.ActionActivate, mail, approval.VersionParams{Version: 3})
	give("node-fr-1", 3)
	progress(t, w, id, "void")
	p := w.Proposal(kms.ActionActivate, mail, approval.VersionParams{Version: 2})
	refused(t, w, kms.Conflict, w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer)))
}

// TestActivateWaitsForAllNodes: as an action and in a rule it is refused as programs do
// that do not know it.
func TestActivateWaitsForAllNodes(t *testing.T) {
	w := small(t)
	open := func(p approval.Proposal) []byte {
		return w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	}
	act := w.Proposal(kms.ActionActivate, mail, approval.VersionParams{Version: 1})
	refused(t, w, kms.Invalid, open(act))
	refused(t, w, kms.Invalid, open(w.Proposal(kms.ActionPolicy, "policy/standard", withActivate())))
	w.Announce()
	if err := w.State().Check(open(w.Proposal(kms.ActionPolicy, "policy/standard", withActivate()))); err != nil {
		t.Error(err)
	}
}

// TestActivateWithoutWitness: the receipt of a node that is gone does not show that
// anybody can open the version.
func TestActivateWithoutWitness(t *testing.T) {
	w := small(t)
	w.GiveReceipts()
	w.JoinWhole("node-fr-2", "fr")
	w.Carry(kms.ActionPolicy, "policy/standard", withActivate())
	id := w.Propose(kms.ActionRotate, mail, nil)
	w.ApproveAll(id)
	w.Commit(id)
	w.Do("node-fr-2", w.ReceiptCommand("node-fr-2", "europe", "mail", 2))
	propose := func() []byte {
		p := w.Proposal(kms.ActionActivate, mail, approval.VersionParams{Version: 2})
		return w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	}
	if err := w.State().Check(propose()); err != nil {
		t.Errorf("while the node is there: %v", err)
	}
	w.RemoveNode("node-fr-2", false)
	refused(t, w, kms.Conflict, propose())
}
