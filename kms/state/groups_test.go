package state_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// grouped is the policy standard with a group in the rule to rotate.
func grouped(g approval.Group) approval.PolicyParams {
	rules := slices.Clone(statetest.Policies(3)[1].Rules)
	rules[5].Need = &g
	return approval.PolicyParams{Rules: rules}
}

// fr1OrJapan is met by fr-1, or by both custodians of jp.
var fr1OrJapan = approval.Group{Need: 1, Custodians: []approval.Weight{{Name: "fr-1", Weight: 1}}, Sites: []approval.SiteWeight{{Name: "jp", Weight: 1, Approvals: 2}}}

// TestGroupDecides: the group is asked for besides the thresholds, and to change it
// takes it too, as it was and as it will be.
func TestGroupDecides(t *testing.T) {
	w := small(t)
	w.Announce()
	set := w.Propose(kms.ActionPolicy, "policy/standard", grouped(fr1OrJapan))
	w.Approve(set, "fr-2", "de-1", "jp-1", "de-2")
	progress(t, w, set, "open") // the new rule asks for the group
	d, _, _ := w.State().Decision(set)
	if got := strings.Join(d.Missing, "; "); got != "1 of: fr-1, 2 custodians of site jp" {
		t.Errorf("it lacks %q", got)
	}
	refused(t, w, kms.NeedsApproval, w.Command("node-fr-1", state.Execute{Proposal: set}, statetest.Expect(1)))
	w.Approve(set, "jp-2")
	progress(t, w, set, "authorised")
	w.Execute(set)

	id := w.Propose(kms.ActionRotate, mail, nil)
	w.Approve(id, "fr-2", "de-1", "de-2")
	progress(t, w, id, "open")
	w.Approve(id, "fr-1")
	progress(t, w, id, "authorised")

	// A custodian's approvals will count under the group, so it takes it too.
	add := w.Propose(kms.ActionCustodian, "custodian/de-9", approval.CustodianParams{Custodian: statetest.Record("de-9", "de", 0, w.AddCustodianKey("de-9"))})
	w.Approve(add, "fr-2", "de-1", "jp-1")
	progress(t, w, add, "open")
	w.Approve(add, "fr-1")
	progress(t, w, add, "authorised")

	// To take the group away takes the old one, another one takes both.
	away := w.Propose(kms.ActionPolicy, "policy/standard", approval.PolicyParams{Rules: statetest.Policies(3)[1].Rules})
	w.Approve(away, "fr-2", "de-1", "jp-1")
	progress(t, w, away, "open")
	w.Vote(away, "fr-2", approval.Reject)
	w.Vote(away, "fr-1", approval.Reject) // jp-1 and jp-2 could still
	progress(t, w, away, "open")
	w.Vote(away, "jp-2", approval.Reject)
	progress(t, w, away, "rejected")
	other := w.Propose(kms.ActionPolicy, "policy/standard", grouped(approval.Group{Need: 2, Custodians: []approval.Weight{{Name: "de-2", Weight: 2}}}))
	w.Approve(other, "fr-1", "de-1", "jp-1")
	progress(t, w, other, "open")
	w.Approve(other, "de-2")
	w.Execute(other)

	// Who is named in a group that nobody else could meet stays.
	gone := statetest.Record("de-2", "de", 0, w.Custodian("de-2"))
	gone.Revoked = true
	p := w.Proposal(kms.ActionCustodian, "custodian/de-2", approval.CustodianParams{Custodian: gone})
	refused(t, w, kms.Conflict, w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer)))
}

// TestGroupRefused: what cannot be met, and what names a site or custodian that is
// not, is refused when it is proposed.
func TestGroupRefused(t *testing.T) {
	w := small(t)
	w.Announce()
	for name, g := range map[string]approval.Group{
		"more than a site has": {Need: 1, Sites: []approval.SiteWeight{{Name: "jp", Weight: 1, Approvals: 3}}},
		"no such site":         {Need: 1, Custodians: []approval.Weight{{Name: "fr-1", Weight: 1}}, Sites: []approval.SiteWeight{{Name: "xx", Weight: 1, Approvals: 1}}},
		"no such custodian":    {Need: 1, Custodians: []approval.Weight{{Name: "fr-1", Weight: 1}, {Name: "fr-7", Weight: 1}}},
	} {
		p := w.Proposal(kms.ActionPolicy, "policy/standard", grouped(g))
		r := w.Apply(w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer)))
		if r.Kind != kms.Invalid && r.Kind != kms.Conflict {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

// TestGroupsWaitForAllNodes: older programs cannot parse them and give kms.Invalid, so
// this one gives the same until all nodes know them. Nothing carries a feature out.
func TestGroupsWaitForAllNodes(t *testing.T) {
	w := small(t)
	kind := state.CommandKind{Type: state.TypeFeature, Version: uint16(state.FeatureRules)}
	older := state.Program("older")
	older.Kinds = slices.DeleteFunc(slices.Clone(older.Kinds), func(k state.CommandKind) bool { return k == kind })
	open := func() []byte {
		p := w.Proposal(kms.ActionPolicy, "policy/standard", grouped(fr1OrJapan))
		return w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	}
	for i, node := range w.NodeIDs() {
		if i == 1 {
			w.Do(node, older)
			refused(t, w, kms.Invalid, open())
		}
		if w.State().Knows(state.FeatureRules) {
			t.Errorf("known although %s has not announced it", node)
		}
		refused(t, w, kms.Unavailable, w.Command("node-fr-1", state.Tick{}, of(kind)))
		refused(t, w, kms.Invalid, open())
		news, _ := w.State().News(node, state.Program("newer"))
		w.Do(node, news)
	}
	if !w.State().Knows(state.FeatureRules) {
		t.Error("not known although all have announced it")
	}
	if r := w.Apply(open()); r.Err() != nil {
		t.Errorf("with all nodes' announcements: %v", r.Err())
	}
	if r := w.Apply(w.Command("node-fr-1", state.Tick{}, of(kind))); r.Kind != kms.Invalid || r.Halt {
		t.Errorf("a command of the feature's kind: %+v", r)
	}
}

// TestGroupInTheGenesis: a founding policy may have one, whatever is announced.
func TestGroupInTheGenesis(t *testing.T) {
	policies := statetest.Policies(3)
	policies[1].Rules[5].Need = &fr1OrJapan
	w := statetest.New(t, statetest.Options{Policies: policies})
	w.CreateKeyring("europe", "fr", "de")
	w.CreateKey("europe", "mail", kms.Encrypt)
	id := w.Propose(kms.ActionRotate, mail, nil)
	w.Approve(id, "fr-2", "de-1", "jp-1")
	progress(t, w, id, "open")
	w.Approve(id, "jp-2")
	progress(t, w, id, "authorised")
	restoreBoth(t, w.State())
}

// TestTimeOfRelease: what a rule releases waits for its time, however early it is
// approved, and a proposal that could not live to see it is refused.
func TestTimeOfRelease(t *testing.T) {
	w := small(t)
	w.Announce()
	rules := slices.Clone(statetest.Policies(3)[1].Rules)
	release := w.State().Clock() + 48*time.Hour.Milliseconds()
	rules[5].NotBefore = release
	w.Carry(kms.ActionPolicy, "policy/standard", approval.PolicyParams{Rules: rules})
	early := w.Proposal(kms.ActionRotate, mail, nil)
	early.Expires = early.Created + 47*time.Hour.Milliseconds()
	refused(t, w, kms.Invalid, w.Command("node-fr-1", state.OpenProposal{Proposal: early.Marshal()}, statetest.As(early.Proposer)))
	id := w.Propose(kms.ActionRotate, mail, nil)
	w.ApproveAll(id)
	progress(t, w, id, "waiting")
	p, _ := w.State().Proposal(id)
	refused(t, w, kms.Conflict, w.Command("node-fr-1", w.CommitCommand(id), statetest.Expect(p.Content.Revision)))
	w.Advance(49 * time.Hour)
	progress(t, w, id, "authorised")
	w.Commit(id)
	restoreBoth(t, w.State())
}

// TestNamesake: a custodian of one site is not taken for one of another site of the
// same name, neither to be kept from approving nor to approve.
func TestNamesake(t *testing.T) {
	w := small(t)
	open := func(proposer string) []byte {
		p := w.Proposal(kms.ActionRotate, mail, nil)
		p.Proposer = proposer
		return w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(proposer))
	}
	if err := w.State().Check(open("spiffe://fr.example/custodian/de-1")); err != nil {
		t.Errorf("while an older program may decide: %v", err)
	}
	w.Announce()
	refused(t, w, kms.Denied, open("spiffe://fr.example/custodian/de-1"))
	for _, who := range []string{"spiffe://fr.example/custodian/nobody", "spiffe://fr.example/operator/de-1", "spiffe://de.example/custodian/de-1"} {
		if err := w.State().Check(open(who)); err != nil {
			t.Errorf("%s: %v", who, err)
		}
	}
}
