package state_test

import (
	"bytes"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

const brought = "key/europe/brought"

// importing is a cluster with a keyring of each protection that lets keys in.
func importing(t testing.TB) *statetest.World {
	w := small(t)
	w.CreateHardwareKeyring("vault", "fr", "de")
	w.GiveReceipts()
	w.Announce()
	w.AllowImport()
	return w
}

func openProposal(w *statetest.World, p approval.Proposal) []byte {
	return w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
}

func TestImportKey(t *testing.T) {
	w := importing(t)
	for path, purpose := range map[string]kms.Purpose{"europe/brought": kms.Encrypt, "europe/signer": kms.Sign, "vault/code": kms.MAC, "vault/signer": kms.Sign} {
		ring, name, _ := kms.SplitKeyPath(path)
		id := w.ImportKey(ring, name, purpose)
		k := key(t, w.State(), ring, name)
		p, _ := w.State().Proposal(id)
		v, _ := w.State().Version(ring, name, 1)
		if p.Progress != state.Executed || v.Proposal != id || v.State != kms.Active || k.Primary != 1 || k.Purpose != purpose || k.Creator != p.Content.Proposer {
			t.Errorf("%s: %+v, proposal %s, primary %d, creator %s", path, v, p.Progress, k.Primary, k.Creator)
		}
		if !bytes.Equal(p.Execution, v.Statement) || !bytes.Equal(k.Statement, v.Statement) {
			t.Errorf("%s: the statements differ", path)
		}
	}
	w.GiveReceipts()
	w.Rotate("europe", "brought")
	w.Rotate("vault", "signer")
	if v, _ := w.State().Version("vault", "signer", 1); len(v.Receipts) != 2 || v.Generated != kms.OnHost {
		t.Errorf("%d receipts, generated %q", len(v.Receipts), v.Generated)
	}
	restoreBoth(t, w.State())
}

// TestImportedKeyIsDestroyed: nothing of the material is left, neither in the key nor in
// the proposal, and the state can still be verified.
func TestImportedKeyIsDestroyed(t *testing.T) {
	w := importing(t)
	var ids []string
	for _, path := range []string{"europe/brought", "vault/code"} {
		ring, name, _ := kms.SplitKeyPath(path)
		ids = append(ids, w.ImportKey(ring, name, kms.MAC))
		gone := w.Propose(kms.ActionDestroy, approval.KeyTarget(ring, name), approval.VersionParams{})
		w.ApproveAll(gone)
		defer func() {
			if v, _ := w.State().Version(ring, name, 1); len(v.Wrapped)+len(v.Copies)+len(v.Statement) != 0 {
				t.Errorf("%s: %+v", path, v)
			}
		}()
		w.Advance(8 * 24 * time.Hour)
		w.Execute(gone)
	}
	for _, id := range ids {
		if p, _ := w.State().Proposal(id); len(p.Execution) != 0 {
			t.Error("the proposal still holds the command")
		}
	}
	restoreBoth(t, w.State())
}

func TestImportRefused(t *testing.T) {
	w := importing(t)
	good := w.ImportParams("europe", "brought", kms.Encrypt)
	propose := func(target string, change func(*approval.ImportParams)) []byte {
		params := good
		change(&params)
		p := w.Proposal(kms.ActionImport, target, params)
		standard, _ := w.State().Policy("standard")
		p.Revision, p.Policy, p.PolicyRevision = 0, standard.Name, standard.Revision
		return openProposal(w, p)
	}
	none := func(*approval.ImportParams) {}
	refused(t, w, kms.Conflict, propose(mail, none)) // it is there
	refused(t, w, kms.NotFound, propose("key/nowhere/brought", none))
	refused(t, w, kms.Conflict, propose(brought, func(p *approval.ImportParams) { p.Node = "node-jp-1" }))
	refused(t, w, kms.Conflict, propose(brought, func(p *approval.ImportParams) { p.Node = "nobody" }))
	refused(t, w, kms.Invalid, propose(brought, func(p *approval.ImportParams) { p.Algorithm = kms.ECDSAP256 }))
	refused(t, w, kms.Invalid, propose(brought, func(p *approval.ImportParams) {
		p.Purpose, p.Algorithm, p.PublicKey = kms.Sign, kms.ECDSAP256, []byte{4, 5, 6}
	}))
	refused(t, w, kms.Invalid, propose("key/vault/brought", func(p *approval.ImportParams) {
		p.Purpose, p.Algorithm, p.PublicKey = kms.Sign, kms.Ed25519, statetest.PublicKey(kms.Ed25519)
	}))
	late := w.Proposal(kms.ActionImport, brought, good)
	late.Revision = 1
	refused(t, w, kms.Invalid, openProposal(w, late))
	refused(t, w, kms.NotFound, openProposal(w, w.Proposal(kms.ActionRotate, brought, nil)))

	id := w.Propose(kms.ActionImport, brought, good)
	refused(t, w, kms.NeedsApproval, w.Command("node-de-1", w.ImportCommand(id)))
	w.ApproveAll(id)
	refused(t, w, kms.Invalid, w.Command("node-de-1", state.Execute{Proposal: id}))
	bring := func(node string, change func(*state.ImportKey), opts ...statetest.Option) []byte {
		c := w.ImportCommand(id)
		change(&c)
		return w.Command(node, c, opts...)
	}
	refused(t, w, kms.Conflict, bring("node-fr-1", func(*state.ImportKey) {}))    // sealed to node-de-1
	refused(t, w, kms.NotResident, bring("node-jp-1", func(*state.ImportKey) {})) // cannot open the keyring
	refused(t, w, kms.Conflict, bring("node-de-1", func(c *state.ImportKey) { c.Key.Name = "other" }))
	refused(t, w, kms.Conflict, bring("node-de-1", func(c *state.ImportKey) { c.Key.RotationPeriod = 1 }))
	refused(t, w, kms.Conflict, bring("node-de-1", func(c *state.ImportKey) { c.Key.Purpose, c.Key.Algorithm = kms.MAC, kms.HMACSHA256 }))
	refused(t, w, kms.Conflict, bring("node-de-1", func(c *state.ImportKey) { c.Key.KEK++ }))
	refused(t, w, kms.Exists, bring("node-de-1", func(c *state.ImportKey) { k := key(t, w.State(), "europe", "mail"); c.Key.ID = k.ID }))
	refused(t, w, kms.Invalid, bring("node-de-1", func(*state.ImportKey) {}, statetest.Expect(1)))
	refused(t, w, kms.Invalid, bring("node-de-1", func(*state.ImportKey) {}, statetest.As(w.Operator("de"))))
	refused(t, w, kms.Invalid, bring("node-de-1", func(c *state.ImportKey) { c.Key.Wrapped = nil }))
	refused(t, w, kms.Conflict, w.Command("node-de-1", state.ImportKey{Proposal: w.Propose(kms.ActionSuspend, mail, nil), Key: w.ImportCommand(id).Key}))
	w.Do("node-de-1", w.ImportCommand(id))
	refused(t, w, kms.Conflict, bring("node-de-1", func(*state.ImportKey) {})) // once
}

// TestImportOvertaken: a key that is created meanwhile under the name ends the proposal.
func TestImportOvertaken(t *testing.T) {
	w := importing(t)
	id := w.Propose(kms.ActionImport, brought, w.ImportParams("europe", "brought", kms.Encrypt))
	w.ApproveAll(id)
	w.CreateKey("europe", "brought", kms.MAC)
	progress(t, w, id, "void")
	restoreBoth(t, w.State())
}

// TestImportWaitsForAllNodes: as an action and in a rule it is refused as programs do
// that do not know it.
func TestImportWaitsForAllNodes(t *testing.T) {
	w := small(t)
	standard, _ := w.State().Policy("standard")
	rules := append(standard.Rules[:4:4], append([]approval.Rule{{Action: kms.ActionImport, Direct: []string{"operator"}}}, standard.Rules[4:]...)...)
	p := func() []byte {
		return openProposal(w, w.Proposal(kms.ActionPolicy, "policy/standard", approval.PolicyParams{Rules: rules}))
	}
	refused(t, w, kms.Invalid, p())
	refused(t, w, kms.Invalid, openProposal(w, w.Proposal(kms.ActionImport, brought, w.ImportParams("europe", "brought", kms.Encrypt))))
	w.Announce()
	if err := w.State().Check(p()); err != nil {
		t.Error(err)
	}
}
