package audit

import (
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

func verifies(t *testing.T, w *statetest.World, e Evidence, kind kms.Kind) Report {
	t.Helper()
	r, err := VerifyEvidence(e, w.State().Cluster())
	if kms.KindOf(err) != kind {
		t.Errorf("%v, want kind %v", err, kind)
	}
	return r
}

func TestEvidenceReceiptsOfEverySite(t *testing.T) {
	w := statetest.New(t, statetest.Options{NodesPerSite: 2})
	c := w.KeyringCommand("wide", "de", "fr", "jp")
	c.Receipts = kms.EverySite
	w.Do("node-de-1", c, statetest.As(w.Operator("de")))
	w.CreateKey("wide", "orders", kms.MAC)
	id := w.Propose(kms.ActionRotate, "key/wide/orders", nil)
	w.ApproveAll(id)
	commit := w.Commit(id)
	give := func(node string) {
		w.Do(node, w.ReceiptCommand(node, commit.Keyring, commit.Key, commit.Version))
	}
	give("node-de-2")
	give("node-jp-1")
	if _, err := BuildEvidence(w.State(), id); !errors.Is(err, kms.Conflict) {
		t.Errorf("two sites of three: %v", err)
	}
	give("node-fr-1")
	e := mustBuild(t, w, id)
	if r := verifies(t, w, e, 0); !slices.Equal(r.Receipts, []string{"node-de-2", "node-fr-1", "node-jp-1"}) {
		t.Errorf("receipts %v", r.Receipts)
	}
	give("node-fr-2")
	e = mustBuild(t, w, id)
	e.Receipts = slices.Delete(e.Receipts, 1, 2)
	verifies(t, w, e, 0) // node-fr-2 speaks for its site
	e.Receipts = slices.Delete(e.Receipts, 1, 2)
	verifies(t, w, e, kms.Conflict)
}

// policies returns those of statetest with another rule for one action on keys.
func policies(rule approval.Rule) []approval.Policy {
	p := statetest.Policies(3)
	i := slices.IndexFunc(p[1].Rules, func(r approval.Rule) bool { return r.Action == rule.Action })
	p[1].Rules[i] = rule
	return p
}

func TestEvidenceOfADirectDecision(t *testing.T) {
	w := statetest.New(t, statetest.Options{Policies: policies(approval.Rule{Action: kms.ActionSuspend, Direct: []string{"operator"}})})
	w.CreateKeyring("coalition", "de", "fr")
	w.CreateKey("coalition", "orders", kms.Encrypt)
	id := w.Propose(kms.ActionSuspend, ordersTarget, nil)
	w.Execute(id)
	e := mustBuild(t, w, id)
	if r := verifies(t, w, e, 0); len(r.Approvals) != 0 || len(r.Notes) != 2 {
		t.Errorf("%+v", r)
	}
	// A service may not, even if a node opens the proposal for it.
	p := w.Proposal(kms.ActionResume, ordersTarget, nil)
	p.Action, p.Revision, p.Proposer = kms.ActionSuspend, e.mustRevision(t), w.Service("de")
	forged := p.Marshal()
	e.Decision.Proposal = forged
	e.Decision.Open = w.Command("node-de-1", state.OpenProposal{Proposal: forged}, statetest.As(p.Proposer))
	e.Decision.Execution = w.Command("node-de-1", state.Execute{Proposal: approval.ProposalID(forged)}, statetest.Expect(p.Revision))
	verifies(t, w, e, kms.Denied)
}

func (e Evidence) mustRevision(t *testing.T) uint64 {
	t.Helper()
	p, err := approval.ParseProposal(e.Decision.Proposal)
	if err != nil {
		t.Fatal(err)
	}
	return p.Revision
}

// TestEvidenceHonoursRejections adds the true rejection of somebody who may end
// the proposal.
func TestEvidenceHonoursRejections(t *testing.T) {
	hour := time.Hour.Milliseconds()
	w := statetest.New(t, statetest.Options{Policies: policies(approval.Rule{
		Action: kms.ActionSuspend, Approvals: 1, Sites: 1, Lifetime: hour, Veto: []string{"jp-1"},
	})})
	w.CreateKeyring("coalition", "de", "fr")
	w.CreateKey("coalition", "orders", kms.Encrypt)
	suspend := w.Propose(kms.ActionSuspend, ordersTarget, nil)
	w.Approve(suspend, "de-1")
	w.Execute(suspend)
	e := mustBuild(t, w, suspend)
	e.Decision.Votes = append(e.Decision.Votes, w.Statement(suspend, "fr-1", approval.Reject))
	if r := verifies(t, w, e, 0); len(r.Rejections) != 1 {
		t.Errorf("%+v", r.Rejections)
	}
	e.Decision.Votes[1] = w.Statement(suspend, "jp-1", approval.Reject)
	verifies(t, w, e, kms.Denied)

	w.Carry(kms.ActionResume, ordersTarget, nil)
	destroy := w.Propose(kms.ActionDestroy, ordersTarget, approval.VersionParams{})
	w.Approve(destroy, "de-1", "fr-1", "jp-1")
	w.Advance(7 * 24 * time.Hour)
	w.Execute(destroy)
	e = mustBuild(t, w, destroy)
	early := e
	early.Decision.Execution = w.Command("node-de-1", state.Execute{Proposal: destroy}, statetest.Expect(e.mustRevision(t)),
		statetest.At(w.Now()-hour))
	verifies(t, w, early, kms.Conflict)
	e.Decision.Votes = append(e.Decision.Votes, w.Statement(destroy, "jp-2", approval.Reject))
	verifies(t, w, e, kms.Denied)
}

// TestEvidenceOfAnOutvotedQuorum forges a rotation by every node together, with
// the custodians of one site only.
func TestEvidenceOfAnOutvotedQuorum(t *testing.T) {
	w := newWorld(t)
	id := w.Propose(kms.ActionRotate, ordersTarget, nil)
	w.Approve(id, "de-1", "de-2")
	if _, err := BuildEvidence(w.State(), id); !errors.Is(err, kms.Conflict) {
		t.Error(err)
	}
	p, _ := w.State().Proposal(id)
	key, _ := w.State().Key("coalition", "orders")
	ring, _ := w.State().Keyring("coalition")
	e := Evidence{
		Format: EvidenceFormat, Cluster: w.State().Cluster(), Genesis: w.Signed().Marshal(), Keyring: ring.Statement, Key: key.Statement,
		Decision: Decision{
			Proposal: p.Bytes, Open: p.Statement,
			Votes:     []approval.Statement{w.Statement(id, "de-1", approval.Approve), w.Statement(id, "de-2", approval.Approve)},
			Execution: w.Command("node-de-1", w.CommitCommand(id), statetest.Expect(key.Revision)),
		},
	}
	for _, n := range w.NodeIDs() {
		e.Receipts = append(e.Receipts, w.Command(n, w.ReceiptCommand(n, "coalition", "orders", 2)))
	}
	verifies(t, w, e, kms.NeedsApproval)
	e.Decision.Votes = append(e.Decision.Votes, w.Statement(id, "fr-1", approval.Approve))
	verifies(t, w, e, 0) // nothing else was wrong
}
