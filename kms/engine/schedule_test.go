package engine

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// TestReschedule: custodians give a key another rotation period, and its rotation is
// proposed by it.
func TestReschedule(t *testing.T) {
	w := newWorld(t, "")
	as := w.agents()
	w.keyring("r", "fr", "de")
	w.key("r", "data", kms.Encrypt)
	w.settle(as)
	var rules []wire.Rule
	for _, r := range testPolicies()[1].Rules {
		rules = append(rules, ruleView(r))
	}
	rules = append(rules, wire.Rule{Action: "schedule", Approvals: 2, Sites: 2, LifetimeMS: (24 * time.Hour).Milliseconds()})
	p := w.propose(kms.ActionPolicy, "policy/standard", wire.ProposalParameters{Rules: rules})
	w.vote(p, approval.Approve, "fr-a", "de-a", "jp-a")
	w.settle(as)
	day := (24 * time.Hour).Milliseconds()
	for name, params := range map[string]wire.ProposalParameters{"no period": {}, "a version": {Version: 1, RotationPeriodMS: &day}} {
		_, err := w.at("de").engine.OpenProposal(bg, caller("operator", "de"), wire.OpenProposalRequest{Action: "schedule", Target: "key/r/data", Parameters: params, Reason: "x"})
		if kms.KindOf(err) != kms.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
	p = w.propose(kms.ActionSchedule, "key/r/data", wire.ProposalParameters{RotationPeriodMS: &day})
	if p.Content.Parameters.RotationPeriodMS == nil || *p.Content.Parameters.RotationPeriodMS != day {
		t.Errorf("%+v", p.Content.Parameters)
	}
	w.vote(p, approval.Approve, "fr-a", "de-a")
	w.settle(as)
	if k := check[wire.Key](t)(w.at("jp").engine.Key(bg, caller("auditor", "jp"), "r", "data")); k.RotationPeriodMS != day {
		t.Errorf("the period is %d ms", k.RotationPeriodMS)
	}
	w.clock.Advance(23 * time.Hour)
	w.tick()
	w.settle(as)
	if !slices.ContainsFunc(w.cluster.State().ProposalsOpen(), func(p state.Proposal) bool {
		return p.Content.Action == kms.ActionRotate && strings.HasPrefix(p.Content.Reason, "Scheduled rotation")
	}) {
		t.Error("nobody proposes the rotation")
	}
}
