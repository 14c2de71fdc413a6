package state_test

import (
	"slices"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

var mail = approval.KeyTarget("europe", "mail")

func progress(t *testing.T, w *statetest.World, id, want string) {
	t.Helper()
	d, got, ok := w.State().Decision(id)
	if !ok || got != want {
		t.Errorf("proposal is %s (%+v), want %s", got, d, want)
	}
}

func TestOpenRefused(t *testing.T) {
	w := small(t)
	open := func(change func(*approval.Proposal), opts ...statetest.Option) []byte {
		p := w.Proposal(kms.ActionRotate, mail, nil)
		change(&p)
		return w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, append([]statetest.Option{statetest.As(w.Operator("de"))}, opts...)...)
	}
	same := func(*approval.Proposal) {}
	refused(t, w, kms.Invalid, open(func(p *approval.Proposal) { p.Cluster = "00000000000000000000000000000000" }))
	refused(t, w, kms.Denied, open(func(p *approval.Proposal) { p.Proposer = w.Operator("fr") }))
	refused(t, w, kms.Denied, open(same, statetest.As("")))
	refused(t, w, kms.Denied, open(func(p *approval.Proposal) { p.Proposer = "spiffe://evil.example/operator/x" }, statetest.As("spiffe://evil.example/operator/x")))
	refused(t, w, kms.Conflict, open(func(p *approval.Proposal) { p.Revision = 2 }))
	refused(t, w, kms.Conflict, open(func(p *approval.Proposal) { p.PolicyRevision = 2 }))
	refused(t, w, kms.Conflict, open(func(p *approval.Proposal) { p.Policy = "lax" }))
	refused(t, w, kms.Conflict, open(func(p *approval.Proposal) { p.Policy = kms.Governance }))
	refused(t, w, kms.NotFound, open(func(p *approval.Proposal) { p.Target = "key/europe/none" }))
	refused(t, w, kms.NotFound, open(func(p *approval.Proposal) { p.Target = "key/asia/mail" }))
	refused(t, w, kms.Invalid, open(func(p *approval.Proposal) { p.Expires++ }))
	refused(t, w, kms.Invalid, open(func(p *approval.Proposal) { p.Created += state.Window + 1; p.Expires = p.Created + 1000 }))
	refused(t, w, kms.Invalid, open(func(p *approval.Proposal) { p.Created -= state.Window + 1 }))
	refused(t, w, kms.Invalid, open(same, statetest.Expect(1)))
	refused(t, w, kms.Conflict, open(func(p *approval.Proposal) { p.Action = kms.ActionResume })) // not suspended
	id := w.Propose(kms.ActionRotate, mail, nil)
	refused(t, w, kms.Exists, open(func(p *approval.Proposal) { p.Reason = "again" })) // one at a time
	// When it has expired, another one may be opened.
	w.Advance(73 * time.Hour)
	progress(t, w, id, state.Expired)
	if n := len(w.State().ProposalsOpen()); n != 0 {
		t.Errorf("%d proposals are open after expiry", n)
	}
	w.Propose(kms.ActionRotate, mail, nil)
	refused(t, w, kms.Expired, w.Command("node-fr-1", state.CastVote{Statement: w.Statement(id, "fr-1", approval.Approve)}))
}

// TestNodeProposes lets a node open a proposal by itself, as a schedule does.
func TestNodeProposes(t *testing.T) {
	w := small(t)
	p := w.Proposal(kms.ActionRotate, mail, nil)
	p.Proposer = "spiffe://jp.example/node/node-jp-1"
	b := p.Marshal()
	refused(t, w, kms.Denied, w.Command("node-de-1", state.OpenProposal{Proposal: b}))
	w.Do("node-jp-1", state.OpenProposal{Proposal: b})
}

func TestVotes(t *testing.T) {
	w := small(t)
	id := w.Propose(kms.ActionRotate, mail, nil)
	cast := func(s approval.Statement) []byte { return w.Command("node-jp-1", state.CastVote{Statement: s}) }
	forged := w.Statement(id, "fr-1", approval.Approve)
	forged.Custodian = "de-1"
	refused(t, w, kms.Denied, cast(forged)) // not de-1's credential
	forged.Custodian = "nobody"
	refused(t, w, kms.Denied, cast(forged))
	forged = w.Statement(id, "fr-1", approval.Approve)
	forged.Verdict = approval.Reject
	refused(t, w, kms.BadSignature, cast(forged))
	forged = w.Statement(id, "fr-1", approval.Approve)
	forged.Proposal = "00000000000000000000000000000000"
	refused(t, w, kms.NotFound, cast(forged))
	w.Approve(id, "fr-1")
	refused(t, w, kms.Exists, cast(w.Statement(id, "fr-1", approval.Approve)))
	w.Approve(id, "fr-2") // same site: two approvals, one site
	progress(t, w, id, "open")
	refused(t, w, kms.NeedsApproval, w.Command("node-fr-1", w.CommitCommand(id), statetest.Expect(1)))
	w.Approve(id, "de-1")
	progress(t, w, id, "authorised")
	// Withdrawing takes the authorisation back; the old approval cannot come again.
	old := w.Statement(id, "de-1", approval.Approve)
	w.Vote(id, "de-1", approval.Reject)
	progress(t, w, id, "open")
	refused(t, w, kms.Conflict, cast(old))
	w.Vote(id, "de-2", approval.Reject)
	w.Approve(id, "jp-1")
	progress(t, w, id, "authorised")
	p, _ := w.State().Proposal(id)
	if len(p.Votes) != 5 || p.AuthorisedAt != w.State().Clock() {
		t.Errorf("%d votes, authorised at %d", len(p.Votes), p.AuthorisedAt)
	}
	w.Commit(id)
	refused(t, w, kms.Conflict, cast(w.Statement(id, "jp-2", approval.Approve)))
	refused(t, w, kms.Conflict, w.Command("node-de-1", w.CommitCommand(id), statetest.Expect(1))) // the first commit wins
}

func TestRejection(t *testing.T) {
	w := small(t)
	id := w.Propose(kms.ActionRotate, mail, nil)
	for _, c := range []string{"fr-1", "fr-2", "de-1"} {
		w.Vote(id, c, approval.Reject)
		progress(t, w, id, "open")
	}
	w.Vote(id, "de-2", approval.Reject) // two of jp are left: one site
	progress(t, w, id, "rejected")

	rules := slices.Clone(statetest.Policies(3)[1].Rules)
	rules[5].Veto = []string{"jp-2"}
	w.Carry(kms.ActionPolicy, "policy/standard", approval.PolicyParams{Rules: rules})
	id = w.Propose(kms.ActionRotate, mail, nil)
	w.Vote(id, "jp-1", approval.Reject)
	progress(t, w, id, "open")
	w.ApproveAll(id)
	progress(t, w, id, "authorised")
	w.Vote(id, "jp-2", approval.Reject)
	progress(t, w, id, "rejected")
}

func TestDestroyWaits(t *testing.T) {
	w := small(t)
	id := w.Propose(kms.ActionDestroy, mail, approval.VersionParams{})
	w.ApproveAll(id)
	progress(t, w, id, state.Waiting)
	exec := func() []byte { return w.Command("node-jp-1", state.Execute{Proposal: id}, statetest.Expect(1)) }
	refused(t, w, kms.Conflict, exec())
	w.Advance(7*24*time.Hour - time.Millisecond)
	refused(t, w, kms.Conflict, exec())
	w.Advance(time.Millisecond)
	refused(t, w, kms.Conflict, w.Command("node-jp-1", state.Execute{Proposal: id}, statetest.Expect(2)))
	refused(t, w, kms.Invalid, w.Command("node-jp-1", state.Execute{Proposal: id}, statetest.Expect(1), statetest.As(w.Operator("fr"))))
	if r := w.Apply(exec()); r.Err() != nil {
		t.Fatal(r.Err())
	}
	refused(t, w, kms.Conflict, exec())
	for _, a := range []kms.Action{kms.ActionRotate, kms.ActionSuspend} {
		p := w.Proposal(a, mail, nil)
		refused(t, w, kms.Conflict, w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer)))
	}
}

func TestNotBefore(t *testing.T) {
	w := small(t)
	p := w.Proposal(kms.ActionSuspend, mail, nil)
	p.NotBefore = p.Created + time.Hour.Milliseconds()
	id := w.Open(p)
	w.Approve(id, "jp-1")
	progress(t, w, id, state.Waiting)
	refused(t, w, kms.Conflict, w.Command("node-fr-1", state.Execute{Proposal: id}, statetest.Expect(1)))
	w.Advance(time.Hour)
	progress(t, w, id, "authorised")
	w.Execute(id)
}

func TestTargetChangeVoids(t *testing.T) {
	w := small(t)
	rotate := w.Propose(kms.ActionRotate, mail, nil)
	w.ApproveAll(rotate)
	w.Carry(kms.ActionSuspend, mail, nil)
	progress(t, w, rotate, "void")
	refused(t, w, kms.Conflict, w.Command("node-fr-1", w.CommitCommand(rotate), statetest.Expect(1)))
}

// TestRevocation takes the approval of a revoked custodian back.
func TestRevocation(t *testing.T) {
	w := small(t)
	id := w.Propose(kms.ActionRotate, mail, nil)
	w.Approve(id, "fr-1", "de-1")
	c := statetest.Record("de-1", "de", 0, w.Custodian("de-1"))
	c.Revoked = true
	w.Carry(kms.ActionCustodian, "custodian/de-1", approval.CustodianParams{Custodian: c})
	progress(t, w, id, "open")
	refused(t, w, kms.Denied, w.Command("node-fr-1", state.CastVote{Statement: w.Statement(id, "de-1", approval.Reject)}))
	w.Approve(id, "jp-1")
	progress(t, w, id, "authorised")
	// Revoked is for good, and a site is too.
	refuse := func(c approval.Custodian) {
		t.Helper()
		p := w.Proposal(kms.ActionCustodian, "custodian/"+c.ID, approval.CustodianParams{Custodian: c})
		refused(t, w, kms.Conflict, w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer)))
	}
	c.Revoked = false
	refuse(c)
	refuse(statetest.Record("fr-1", "jp", 0, w.Custodian("fr-1")))
	// Nobody is revoked whom a policy cannot do without.
	last := statetest.Record("de-2", "de", 0, w.Custodian("de-2"))
	last.Revoked = true
	refuse(last)
}

// TestNewCredential drops a credential and with it the vote made with it.
func TestNewCredential(t *testing.T) {
	w := small(t)
	id := w.Propose(kms.ActionRotate, mail, nil)
	w.Approve(id, "fr-1", "de-1")
	old := w.Statement(id, "de-1", approval.Reject)
	change := w.Propose(kms.ActionCustodian, "custodian/de-1", approval.CustodianParams{Custodian: statetest.Record("de-1", "de", 0, w.AddCustodianKey("de-1"))})
	w.Approve(change, "fr-1", "jp-1")
	progress(t, w, change, "open") // destruction takes three sites, so this does too
	w.Approve(change, "de-2")
	w.Execute(change)
	progress(t, w, id, "open")
	refused(t, w, kms.Denied, w.Command("node-fr-1", state.CastVote{Statement: old}))
	w.Approve(id, "de-1") // with the new one
	progress(t, w, id, "authorised")
}

// TestNewCustodianTakesStrictest checks that two sites cannot make themselves the
// third that destruction takes, nor take over one who may veto; that they can
// revoke; and that a proposal opened under looser policies meets the new ones.
func TestNewCustodianTakesStrictest(t *testing.T) {
	w := small(t)
	add := w.Propose(kms.ActionCustodian, "custodian/jp-9", approval.CustodianParams{Custodian: statetest.Record("jp-9", "jp", 0, w.AddCustodianKey("jp-9"))})
	w.Approve(add, "fr-1", "de-1", "fr-2", "de-2")
	progress(t, w, add, "open")
	refused(t, w, kms.NeedsApproval, w.Command("node-fr-1", state.Execute{Proposal: add}))
	w.Approve(add, "jp-1")
	progress(t, w, add, "authorised")

	rules := slices.Clone(statetest.Policies(3)[1].Rules)
	rules[3].Approvals, rules[3].Veto = 5, []string{"jp-2"}
	id := w.Propose(kms.ActionPolicy, "policy/standard", approval.PolicyParams{Rules: rules})
	w.Approve(id, "fr-1", "de-1", "jp-1", "fr-2", "de-2")
	w.Execute(id)
	progress(t, w, add, "authorised") // it has five approvals

	change := w.Propose(kms.ActionCustodian, "custodian/jp-2", approval.CustodianParams{Custodian: statetest.Record("jp-2", "jp", 0, w.AddCustodianKey("jp-9"))})
	w.Vote(change, "jp-2", approval.Reject)
	progress(t, w, change, "rejected")

	gone := statetest.Record("de-1", "de", 0, w.Custodian("de-1"))
	gone.Revoked = true
	id = w.Propose(kms.ActionCustodian, "custodian/de-1", approval.CustodianParams{Custodian: gone})
	w.Approve(id, "fr-1", "jp-1")
	w.Execute(id)
	progress(t, w, add, "open") // one of the five is gone
}

// TestCustodianTakesOwnSite checks that other sites cannot make a custodian of a
// site, nor take one over, and with that the approval that the site's nodes take;
// also not after they have revoked all that the site had.
func TestCustodianTakesOwnSite(t *testing.T) {
	world := func() *statetest.World { // where nothing takes more than two custodians of two sites
		return statetest.New(t, statetest.Options{Sites: []string{"fr", "de", "jp"}, Policies: statetest.Policies(2)})
	}
	enrol := func(w *statetest.World, id string) string {
		return w.Propose(kms.ActionCustodian, "custodian/"+id, approval.CustodianParams{Custodian: statetest.Record(id, "fr", 0, w.AddCustodianKey("fr-9"))})
	}
	for _, c := range []string{"fr-9", "fr-2"} {
		w := world()
		id := enrol(w, c)
		w.Approve(id, "de-1", "jp-1", "de-2", "jp-2")
		progress(t, w, id, "open")
		w.Approve(id, "fr-1")
		progress(t, w, id, "authorised")
	}
	w := world()
	for _, c := range []string{"fr-1", "fr-2"} {
		gone := statetest.Record(c, "fr", 0, w.Custodian(c))
		gone.Revoked = true
		id := w.Propose(kms.ActionCustodian, "custodian/"+c, approval.CustodianParams{Custodian: gone})
		w.Approve(id, "de-1", "jp-1")
		w.Execute(id)
	}
	p := w.Proposal(kms.ActionCustodian, "custodian/fr-9", approval.CustodianParams{Custodian: statetest.Record("fr-9", "fr", 0, w.AddCustodianKey("fr-9"))})
	refused(t, w, kms.Conflict, w.Command("node-de-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer)))
}

// TestPolicyChangeTakesStricter checks that a policy cannot be weakened by fewer
// than it asks for itself.
func TestPolicyChangeTakesStricter(t *testing.T) {
	w := small(t)
	rules := slices.Clone(statetest.Policies(3)[1].Rules)
	rules[3].Approvals, rules[3].Sites = 1, 1 // destruction, three of three sites until now
	id := w.Propose(kms.ActionPolicy, "policy/standard", approval.PolicyParams{Rules: rules})
	w.Approve(id, "fr-1", "de-1")
	progress(t, w, id, "open")
	w.Approve(id, "jp-1")
	progress(t, w, id, "authorised")
	w.Execute(id)

	gov := slices.Clone(statetest.Policies(3)[0].Rules)
	gov[3].Approvals, gov[3].Sites = 4, 3 // the new rule for policies is stricter: it counts
	id = w.Propose(kms.ActionPolicy, "policy/governance", approval.PolicyParams{Rules: gov})
	w.Approve(id, "fr-1", "de-1", "jp-1")
	progress(t, w, id, "open")
	w.Approve(id, "jp-2")
	w.Execute(id)
	if p, _ := w.State().Policy(kms.Governance); p.Revision != 2 {
		t.Errorf("governance is at revision %d", p.Revision)
	}
}

// TestNewPolicy adds a policy that did not exist.
func TestNewPolicy(t *testing.T) {
	w := small(t)
	w.Carry(kms.ActionPolicy, "policy/strict", approval.PolicyParams{Rules: statetest.Policies(3)[1].Rules})
	if p, ok := w.State().Policy("strict"); !ok || p.Revision != 1 {
		t.Errorf("policy strict: %+v", p)
	}
}

// TestDirectRule carries out what one person may do alone.
func TestDirectRule(t *testing.T) {
	policies := statetest.Policies(3)
	policies[1].Rules[6] = approval.Rule{Action: kms.ActionSuspend, Direct: []string{"operator"}}
	policies[1].Rules[1] = approval.Rule{Action: kms.ActionCreate, Approvals: 1, Sites: 1, Lifetime: 3600_000}
	w := statetest.New(t, statetest.Options{Policies: policies})
	w.CreateKeyring("europe", "fr", "de")
	refused(t, w, kms.NeedsApproval, w.Command("node-fr-1", w.KeyCommand("europe", "mail", kms.Encrypt), statetest.As(w.Operator("fr"))))

	policies = statetest.Policies(3)
	policies[1].Rules[6] = approval.Rule{Action: kms.ActionSuspend, Direct: []string{"operator"}}
	w = statetest.New(t, statetest.Options{Policies: policies})
	w.CreateKeyring("europe", "fr", "de")
	w.CreateKey("europe", "mail", kms.Encrypt)
	p := w.Proposal(kms.ActionSuspend, mail, nil)
	p.Proposer = w.Service("fr")
	refused(t, w, kms.Conflict, w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer)))
	id := w.Propose(kms.ActionSuspend, mail, nil)
	progress(t, w, id, "authorised")
	w.Execute(id)
	if k, _ := w.State().Key("europe", "mail"); !k.Suspended {
		t.Error("the key is not suspended")
	}
}

// TestVersionRules checks what may happen to a primary version.
func TestVersionRules(t *testing.T) {
	w := small(t)
	for _, a := range []kms.Action{kms.ActionDeactivate, kms.ActionDestroy} {
		p := w.Proposal(a, mail, approval.VersionParams{Version: 1})
		refused(t, w, kms.Conflict, w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer)))
	}
	w.Carry(kms.ActionCompromise, mail, approval.VersionParams{Version: 1})
	k, _ := w.State().Key("europe", "mail")
	if k.Primary != 0 {
		t.Errorf("primary %d is compromised", k.Primary)
	}
	w.Rotate("europe", "mail")
	if k, _ = w.State().Key("europe", "mail"); k.Primary != 2 {
		t.Errorf("primary %d after the rotation", k.Primary)
	}
	p := w.Proposal(kms.ActionDeactivate, mail, approval.VersionParams{Version: 1})
	refused(t, w, kms.Conflict, w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer)))
}

func TestCommitRefused(t *testing.T) {
	w := small(t)
	id := w.Propose(kms.ActionRotate, mail, nil)
	w.ApproveAll(id)
	commit := func(node string, expect uint64, change func(*state.CommitRotation)) []byte {
		c := w.CommitCommand(id)
		change(&c)
		return w.Command(node, c, statetest.Expect(expect))
	}
	same := func(*state.CommitRotation) {}
	refused(t, w, kms.NotResident, commit("node-jp-1", 1, same))
	refused(t, w, kms.Conflict, commit("node-fr-1", 2, same))
	refused(t, w, kms.Conflict, commit("node-fr-1", 1, func(c *state.CommitRotation) { c.Version = 3 }))
	refused(t, w, kms.Conflict, commit("node-fr-1", 1, func(c *state.CommitRotation) { c.KEK = 2 }))
	refused(t, w, kms.Conflict, commit("node-fr-1", 1, func(c *state.CommitRotation) { c.Key = "other" }))
	refused(t, w, kms.NotFound, commit("node-fr-1", 1, func(c *state.CommitRotation) { c.Proposal = "00000000000000000000000000000000" }))
	refused(t, w, kms.Invalid, commit("node-fr-1", 1, func(c *state.CommitRotation) { c.Checks = c.Checks[:1] }))
	refused(t, w, kms.Invalid, commit("node-fr-1", 1, func(c *state.CommitRotation) { c.Wrapped = nil }))
	refused(t, w, kms.Invalid, commit("node-fr-1", 1, func(c *state.CommitRotation) { c.PublicKey = []byte{1} }))
	refused(t, w, kms.Invalid, w.Command("node-fr-1", state.Execute{Proposal: id}, statetest.Expect(1)))
	w.Commit(id)
}

// TestLateReceiptBringsNoOldVersionBack: a version that was overtaken does not
// become primary when the later one is compromised.
func TestLateReceiptBringsNoOldVersionBack(t *testing.T) {
	w := small(t)
	w.GiveReceipts()
	commit := func() {
		id := w.Propose(kms.ActionRotate, mail, nil)
		w.ApproveAll(id)
		w.Commit(id)
	}
	give := func(node string, version uint32) {
		w.Do(node, w.ReceiptCommand(node, "europe", "mail", version))
	}
	commit()
	give("node-de-1", 2) // node-fr-1 keeps its receipt back
	commit()
	give("node-de-1", 3)
	give("node-fr-1", 3)
	w.Carry(kms.ActionCompromise, mail, approval.VersionParams{Version: 3})
	give("node-fr-1", 2)
	k, _ := w.State().Key("europe", "mail")
	v, _ := w.State().Version("europe", "mail", 2)
	if k.Primary != 0 || v.State != kms.PreActive {
		t.Errorf("primary %d, version 2 is %s", k.Primary, v.State)
	}
	commit() // the next rotation sets a primary again
	give("node-de-1", 4)
	give("node-fr-1", 4)
	if k, _ := w.State().Key("europe", "mail"); k.Primary != 4 {
		t.Errorf("primary %d", k.Primary)
	}
}
