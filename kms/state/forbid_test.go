package state_test

import (
	"slices"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/pqc"
)

// forbidding are the parameters of a policy of statetest.Policies that forbids suites.
func forbidding(at int, suites ...pqc.SuiteID) approval.PolicyParams {
	p := approval.PolicyParams{Rules: statetest.Policies(3)[at].Rules}
	for _, s := range suites {
		p.Forbid = append(p.Forbid, uint16(s))
	}
	return p
}

// withForbidden are the rules that the policy standard has, and suites that it forbids.
func withForbidden(t *testing.T, w *statetest.World, suites ...pqc.SuiteID) approval.PolicyParams {
	t.Helper()
	now, ok := w.State().Policy("standard")
	if !ok {
		t.Fatal("no policy")
	}
	p := forbidding(1, suites...)
	p.Rules = now.Rules
	return p
}

// TestForbiddenMaterial: nothing new is made of a suite that the keyring's policy
// forbids, and what there is goes on.
func TestForbiddenMaterial(t *testing.T) {
	w := populated(t)
	rotate := w.Propose(kms.ActionRotate, "key/coalition/mail", nil)
	w.Carry(kms.ActionPolicy, "policy/standard", forbidding(1, pqc.ECDSAP256SHA256))
	progress(t, w, rotate, "void")
	open := func(action kms.Action, target string, params any) []byte {
		p := w.Proposal(action, target, params)
		return w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	}
	create := func(ring, name string, purpose kms.Purpose) []byte {
		return w.Command("node-fr-1", w.KeyCommand(ring, name, purpose), statetest.As(w.Operator("fr")))
	}
	refused(t, w, kms.Conflict, create("coalition", "sign", kms.Sign))
	refused(t, w, kms.Conflict, create("vault", "sign", kms.Sign))
	refused(t, w, kms.Conflict, open(kms.ActionRotate, "key/vault/seal", nil))
	w.AllowImport()
	w.Carry(kms.ActionPolicy, "policy/standard", withForbidden(t, w, pqc.CiphertextFormat1))
	refused(t, w, kms.Conflict, open(kms.ActionImport, "key/coalition/brought", w.ImportParams("coalition", "brought", kms.Encrypt)))
	w.Carry(kms.ActionPolicy, "policy/standard", withForbidden(t, w, pqc.ECDSAP256SHA256))
	w.ImportKey("coalition", "brought", kms.Encrypt)
	w.CreateKey("coalition", "more", kms.Encrypt)
	w.CreateKey("coalition", "mac", kms.MAC) // has no suite
	w.Rotate("coalition", "mail")
	w.Rekey("node-fr-1") // what signs commands is governance's affair
	restoreBoth(t, w.State())

	// Nothing new is sealed to agreement keys of a forbidden suite.
	w.Carry(kms.ActionPolicy, "policy/standard", forbidding(1, pqc.MLKEM768P256))
	w.CreateKey("coalition", "again", kms.Sign)
	w.Rotate("coalition", "mail")
	refused(t, w, kms.Conflict, open(kms.ActionRotate, "keyring/coalition", nil))
	refused(t, w, kms.Conflict, create("vault", "another", kms.Encrypt))
	refused(t, w, kms.Conflict, open(kms.ActionRotate, "key/vault/code", nil))
	refused(t, w, kms.Conflict, w.Command("node-fr-1", w.KeyringCommand("new", "fr"), statetest.As(w.Operator("fr"))))
	next := w.NewRoot("node-fr-1")
	refused(t, w, kms.Conflict, open(kms.ActionNode, "node/node-fr-1", w.NodeParams("node-fr-1", next, false)))
	_, join := w.JoinParams("node-fr-2", "fr", false)
	refused(t, w, kms.Conflict, open(kms.ActionNode, "node/node-fr-2", join))
	w.Carry(kms.ActionPolicy, "policy/standard", forbidding(1))
	w.RotateKEK("coalition")
	fullyRestored(t, w.State())
}

// TestForbiddenMembers: governance forbids suites of custodians' credentials, nodes and
// recovery keys, those that there are excepted.
func TestForbiddenMembers(t *testing.T) {
	w := populated(t)
	open := func(action kms.Action, target string, params any) []byte {
		p := w.Proposal(action, target, params)
		return w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	}
	set := func(suites ...pqc.SuiteID) {
		w.Carry(kms.ActionPolicy, "policy/governance", forbidding(0, suites...))
	}
	enrol := func() []byte {
		return open(kms.ActionCustodian, "custodian/fr-9", approval.CustodianParams{Custodian: statetest.Record("fr-9", "fr", 0, w.AddCustodianKey("fr-9"))})
	}
	recovery := w.RecoveryParams([]string{"de", "fr", "jp"}, 3, 2, "de-1", "fr-1", "fr-2", "jp-1")
	set(pqc.MLDSA65Ed25519)
	refused(t, w, kms.Conflict, enrol())
	same := statetest.Record("fr-1", "fr", 0, w.Custodian("fr-1"))
	if err := w.State().Check(open(kms.ActionCustodian, "custodian/fr-1", approval.CustodianParams{Custodian: same})); err != nil {
		t.Errorf("the credential that they have: %v", err)
	}
	w.Rotate("coalition", "mail") // custodians go on signing
	set(pqc.ECDSAP256SHA256)
	if err := w.State().Check(enrol()); err != nil {
		t.Errorf("another suite is forbidden: %v", err)
	}
	refused(t, w, kms.Conflict, open(kms.ActionNode, "node/node-fr-1", w.NodeParams("node-fr-1", w.NewRoot("node-fr-1"), false)))
	set(pqc.SuiteID(recovery.Suite), pqc.SuiteID(0xFFFF))
	refused(t, w, kms.Conflict, open(kms.ActionRecoveryKey, "recovery/all", recovery))
	restoreBoth(t, w.State())
}

// TestForbidIsGated: programs that cannot parse it refuse it as invalid, and so does
// this one until all nodes know it. To take it away takes what to set it took.
func TestForbidIsGated(t *testing.T) {
	w := small(t)
	open := func() []byte {
		p := w.Proposal(kms.ActionPolicy, "policy/standard", forbidding(1, pqc.Ed25519))
		return w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	}
	refused(t, w, kms.Invalid, open())
	w.Announce()
	w.Carry(kms.ActionPolicy, "policy/standard", forbidding(1, pqc.Ed25519))
	p := w.Proposal(kms.ActionPolicy, "policy/standard", forbidding(1))
	strict, err := w.State().Rule(p)
	if err != nil {
		t.Fatal(err)
	}
	again, err := w.State().Rule(w.Proposal(kms.ActionPolicy, "policy/standard", forbidding(1, pqc.Ed25519)))
	if err != nil || strict.Approvals <= again.Approvals {
		t.Errorf("to allow it takes %d approvals, to leave it %d: %v", strict.Approvals, again.Approvals, err)
	}
	for name, l := range map[string][]uint16{"not sorted": {3, 2}, "twice": {2, 2}, "number 0": {0}, "too many": make([]uint16, 65)} {
		bad := approval.Policy{Name: "standard", Rules: statetest.Policies(3)[1].Rules, Forbid: l}
		if err := bad.Validate(); kms.KindOf(err) != kms.Invalid {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestForbidInTheGenesis: a coalition does not begin with what it forbids.
func TestForbidInTheGenesis(t *testing.T) {
	g := statetest.New(t, statetest.Options{}).Genesis()
	for suite, ok := range map[pqc.SuiteID]bool{pqc.MLKEM768P256: false, pqc.ECDSAP256SHA256: false, pqc.MLDSA65Ed25519: false, pqc.MLKEM1024P384: true} {
		l := slices.Clone(g.Policies)
		for i := range l {
			if l[i].Name == kms.Governance {
				l[i].Forbid = []uint16{uint16(suite)}
			}
		}
		h := g
		h.Policies = l
		if err := h.Validate(); (err == nil) != ok || err != nil && kms.KindOf(err) != kms.Invalid {
			t.Errorf("%s: %v", suite, err)
		}
	}
}
