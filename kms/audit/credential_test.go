package audit

import (
	"slices"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// TestEvidenceKnowsSuspensions: evidence holds the suspensions of credentials, and counts
// without what they had signed, until a quorum has restored them.
func TestEvidenceKnowsSuspensions(t *testing.T) {
	w := newWorld(t)
	w.Announce()
	before := w.Rotate("coalition", "orders")
	id := w.Propose(kms.ActionRotate, ordersTarget, nil)
	w.Approve(id, "fr-2", "de-1")
	w.SuspendCredential("fr-2", "fr-1")
	w.Approve(id, "jp-1")
	w.Commit(id)
	w.GiveReceipts()
	restore := w.Propose(kms.ActionCustodian, "custodian/fr-2", w.RestoreParams("fr-2"))
	w.Approve(restore, "de-1", "jp-1")
	w.Execute(restore)
	after := w.Propose(kms.ActionRotate, ordersTarget, nil)
	w.Approve(after, "fr-2", "de-1")
	w.Commit(after)
	w.GiveReceipts()

	for name, x := range map[string]struct{ id, who, says string }{
		"before": {before, "", ""},
		"during": {id, "de-1 jp-1", "Custodian fr-1 signed that credential"},
		"quorum": {restore, "de-1 jp-1", "Custodian fr-1 signed that credential"},
		"after":  {after, "de-1 fr-2", "Custodian fr-1 signed that credential"},
	} {
		r, err := VerifyEvidence(mustBuild(t, w, x.id), w.State().Cluster())
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var who []string
		for _, a := range r.Approvals {
			who = append(who, a.Custodian)
		}
		said := slices.ContainsFunc(r.Checks, func(c string) bool { return strings.Contains(c, "signed that credential") })
		if got := strings.Join(who, " "); x.who != "" && got != x.who || said != (x.says != "") {
			t.Errorf("%s: approvals of %s, checks %q", name, got, r.Checks)
		}
	}

	good := mustBuild(t, w, id)
	p, _ := w.State().Proposal(id)
	thiefs := p.Votes[slices.IndexFunc(p.Votes, func(v state.Vote) bool { return v.Statement.Custodian == "fr-2" })].Statement
	for name, x := range map[string]struct {
		kind   kms.Kind
		change func(*Evidence)
	}{
		"the suspended credential's vote": {kms.Denied, func(e *Evidence) {
			e.Decision.Votes = []approval.Statement{e.Decision.Votes[0], thiefs, e.Decision.Votes[1]}
		}},
		"a suspension twice": {kms.Exists, func(e *Evidence) {
			e.Decision.Suspensions = append(e.Decision.Suspensions[:1:1], e.Decision.Suspensions[0])
		}},
		"an altered suspension": {kms.BadSignature, func(e *Evidence) {
			b := slices.Clone(e.Decision.Suspensions[0])
			b[len(b)-1] ^= 1
			e.Decision.Suspensions = [][]byte{b}
		}},
		"another command": {kms.Invalid, func(e *Evidence) { e.Decision.Suspensions = [][]byte{e.Decision.Open} }},
	} {
		bad := clone(t, good)
		x.change(&bad)
		if _, err := VerifyEvidence(bad, w.State().Cluster()); kms.KindOf(err) != x.kind {
			t.Errorf("%s: %v", name, err)
		}
	}
	// The restoration names a record that only the suspension made.
	bad := mustBuild(t, w, restore)
	bad.Decision.Suspensions = nil
	if _, err := VerifyEvidence(bad, w.State().Cluster()); kms.KindOf(err) != kms.Conflict {
		t.Errorf("a restoration without the suspension: %v", err)
	}
}

// TestEvidenceOfPossession: the proof that a new credential's holder has it is verified.
func TestEvidenceOfPossession(t *testing.T) {
	w := newWorld(t)
	w.Announce()
	id := w.Carry(kms.ActionCustodian, "custodian/fr-3", approval.CustodianParams{Custodian: statetest.Record("fr-3", "fr", 0, w.AddCustodianKey("fr-3"))})
	e := mustBuild(t, w, id)
	p, err := approval.ParseProposal(e.Decision.Proposal)
	if err != nil {
		t.Fatal(err)
	}
	params, err := p.CustodianParams()
	if err != nil || len(params.Possession) != 1 {
		t.Fatalf("%v: %+v", err, params.Possession)
	}
	params.Possession[0].Signature[0] ^= 1
	w2, err := newReplay(w.State().SignedGenesis())
	if err != nil {
		t.Fatal(err)
	}
	if err := w2.changeCustodian(params); kms.KindOf(err) != kms.BadSignature {
		t.Errorf("a wrong proof: %v", err)
	}
}
