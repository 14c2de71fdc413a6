package audit

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

// TestEvidenceUnderAGroup: the group of the rule counts for the verifier as it does for
// the cluster, and for the change that took it away.
func TestEvidenceUnderAGroup(t *testing.T) {
	w := newWorld(t)
	w.Announce()
	standard, _ := w.State().Policy("standard")
	rules := slices.Clone(standard.Rules)
	at := slices.IndexFunc(rules, func(r approval.Rule) bool { return r.Action == kms.ActionRotate })
	rules[at].Need = &approval.Group{Need: 1, Custodians: []approval.Weight{{Name: "jp-1", Weight: 1}}, Sites: []approval.SiteWeight{{Name: "fr", Weight: 1, Approvals: 2}}}
	set := w.Propose(kms.ActionPolicy, "policy/standard", approval.PolicyParams{Rules: rules})
	w.Approve(set, "de-1", "fr-1", "fr-2")
	w.Execute(set)
	id := w.Propose(kms.ActionRotate, ordersTarget, nil)
	w.Approve(id, "de-1", "fr-1", "jp-1")
	w.Commit(id)
	w.GiveReceipts()

	e := mustBuild(t, w, id)
	r, err := VerifyEvidence(e, w.State().Cluster())
	if err != nil {
		t.Fatal(err)
	}
	if r.Rule.Need == nil || !strings.Contains(strings.Join(r.Checks, " "), "and besides jp-1 or 2 custodians of site fr") {
		t.Errorf("%q", r.Checks)
	}
	without := func(who string) func(*Evidence) {
		return func(e *Evidence) {
			e.Decision.Votes = slices.DeleteFunc(slices.Clone(e.Decision.Votes), func(s approval.Statement) bool { return s.Custodian == who })
		}
	}
	for _, c := range []struct {
		alter func(*Evidence)
		kind  kms.Kind
	}{
		{without("de-1"), 0}, // two of two sites are left, and jp-1
		{without("jp-1"), kms.NeedsApproval},
		{func(e *Evidence) { e.Governance[0].Votes = e.Governance[0].Votes[:2] }, kms.NeedsApproval}, // fr-2
	} {
		bad := mustBuild(t, w, id)
		c.alter(&bad)
		if _, err := VerifyEvidence(bad, ""); c.kind != 0 && !errors.Is(err, c.kind) || c.kind == 0 && err != nil {
			t.Errorf("%v, want kind %v", err, c.kind)
		}
	}
}
