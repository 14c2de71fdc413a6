package state_test

import (
	"cmp"
	"slices"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// withRule adds a rule for an action that a policy may lack: two approvals of two sites.
func withRule(rules []approval.Rule, a kms.Action) []approval.Rule {
	rules = append(slices.Clone(rules), approval.Rule{Action: a, Approvals: 2, Sites: 2, Lifetime: 72 * time.Hour.Milliseconds()})
	slices.SortFunc(rules, func(a, b approval.Rule) int { return cmp.Compare(a.Action, b.Action) })
	return rules
}

// TestSchedule: a quorum gives a key another rotation period; what was proposed of the
// key before is void. A snapshot tells the same, also when version 1 is gone.
func TestSchedule(t *testing.T) {
	w := small(t)
	w.GiveReceipts()
	open := func(period time.Duration) []byte {
		p := w.Proposal(kms.ActionSchedule, mail, approval.ScheduleParams{RotationPeriod: period.Milliseconds()})
		return w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	}
	with := approval.PolicyParams{Rules: withRule(statetest.Policies(3)[1].Rules, kms.ActionSchedule)}
	set := func() []byte {
		p := w.Proposal(kms.ActionPolicy, "policy/standard", with)
		return w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	}
	refused(t, w, kms.Invalid, open(time.Hour)) // an older program cannot parse it
	refused(t, w, kms.Invalid, set())
	w.Announce()
	refused(t, w, kms.Invalid, open(time.Hour)) // the policy has no rule for it
	w.Carry(kms.ActionPolicy, "policy/standard", with)
	refused(t, w, kms.Invalid, open(-time.Hour))

	rotate := w.Propose(kms.ActionRotate, mail, nil)
	id := w.Propose(kms.ActionSchedule, mail, approval.ScheduleParams{RotationPeriod: time.Hour.Milliseconds()})
	w.Approve(id, "fr-1")
	progress(t, w, id, "open")
	w.Approve(id, "de-1")
	before := key(t, w.State(), "europe", "mail")
	w.Execute(id)
	after := key(t, w.State(), "europe", "mail")
	if after.RotationPeriod != time.Hour.Milliseconds() || after.Revision != before.Revision+1 || after.Rotated != before.Rotated {
		t.Errorf("%+v", after)
	}
	progress(t, w, rotate, "void")
	restoreBoth(t, w.State())

	w.Rotate("europe", "mail")
	w.Carry(kms.ActionSchedule, mail, approval.ScheduleParams{RotationPeriod: 2 * time.Hour.Milliseconds()})
	destroy := w.Propose(kms.ActionDestroy, mail, approval.VersionParams{Version: 1})
	w.ApproveAll(destroy)
	w.Advance(7 * 24 * time.Hour)
	w.Execute(destroy)
	w.Carry(kms.ActionSchedule, mail, approval.ScheduleParams{})
	if k := key(t, w.State(), "europe", "mail"); k.RotationPeriod != 0 {
		t.Errorf("%+v", k)
	}
	restoreBoth(t, w.State())

	// The first period of an imported key stands in what custodians signed.
	w.AllowImport()
	w.ImportKey("europe", "brought", kms.Encrypt)
	w.Carry(kms.ActionSchedule, "key/europe/brought", approval.ScheduleParams{RotationPeriod: time.Hour.Milliseconds()})
	w.Rotate("europe", "brought")
	gone := w.Propose(kms.ActionDestroy, "key/europe/brought", approval.VersionParams{Version: 1})
	w.ApproveAll(gone)
	w.Advance(7 * 24 * time.Hour)
	w.Execute(gone)
	restoreBoth(t, w.State())
}
