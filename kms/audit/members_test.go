package audit

import (
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// TestEvidenceAcrossMembership: decisions and rotations stay provable while nodes and
// sites come and go.
func TestEvidenceAcrossMembership(t *testing.T) {
	const fr2, it1 = "node-fr-2", "node-it-1"
	w := newWorld(t)
	w.Announce()
	w.GiveReceipts()
	w.CreateHardwareKeyring("vault", "fr", "de")
	w.CreateKey("vault", "seal", kms.Sign)
	w.CreateKey("vault", "code", kms.MAC)
	w.GiveReceipts()
	w.Advance(time.Minute)
	ids := map[string]string{"before": w.Rotate("coalition", "orders")}

	// A rotation that is committed while a node of the site joins, whose adoption comes
	// after it: nobody can tell the order from what is signed.
	w.Join(fr2, "fr")
	ids["while it joins"] = w.Rotate("coalition", "orders")
	w.Reseal(fr2)
	w.Do(fr2, w.AdoptCommand(fr2))
	w.Announce()
	w.Advance(time.Minute)
	ids["with it"] = w.Rotate("coalition", "orders")
	ids["hardware, with it"] = w.Rotate("vault", "seal")
	ids["promotion"] = w.Carry(kms.ActionNode, approval.NodeTarget(fr2), approval.NodeParams{Change: approval.NodePromote})
	w.ConfirmMembers()

	// A version that waits for its receipt when it is removed.
	waits := w.Propose(kms.ActionRotate, approval.KeyTarget("vault", "code"), nil)
	w.ApproveAll(waits)
	w.Commit(waits)
	for _, node := range []string{"node-de-1", "node-fr-1"} {
		w.Do(node, w.ReceiptCommand(node, "vault", "code", 2))
	}
	if _, err := BuildEvidence(w.State(), waits); kms.KindOf(err) != kms.Conflict {
		t.Errorf("evidence while a receipt is missing: %v", err)
	}
	removal := w.Carry(kms.ActionNode, approval.NodeTarget(fr2), approval.NodeParams{Change: approval.NodeRemove})
	w.ConfirmMembers()
	ids["removal"], ids["waited for it"] = removal, waits
	ids["without it"] = w.Rotate("coalition", "orders")

	// A new site, whose custodian and node take part.
	w.AddSite("it", 1)
	w.JoinWhole(it1, "it")
	w.Do(it1, w.KeyringCommand("rome", "it", "fr"), statetest.As(w.Operator("it")))
	w.GiveReceipts()
	w.CreateKey("rome", "seal", kms.Encrypt)
	ids["at a new site"] = w.Rotate("rome", "seal")
	ids["other CAs"] = w.Carry(kms.ActionSite, "site/it", approval.SiteParams{Change: approval.SiteCAs, CAs: [][]byte{w.CA("it").Certificate.Raw, w.CA("fr").Certificate.Raw}})

	for what, id := range ids {
		e, err := BuildEvidence(w.State(), id)
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		if _, err := VerifyEvidence(e, w.State().Cluster()); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
	if t.Failed() {
		return
	}

	// Without the decision that let the node in, what names it proves nothing; nor does a
	// receipt that is missing without the removal.
	with := mustBuild(t, w, ids["with it"])
	bad := clone(t, with)
	bad.Governance = nil
	if _, err := VerifyEvidence(bad, w.State().Cluster()); err == nil {
		t.Error("a rotation for a stranger is accepted")
	}
	late := mustBuild(t, w, waits)
	if len(late.Later) == 0 {
		t.Error("the removal is not among the later decisions")
	}
	bad = clone(t, late)
	bad.Later = nil
	if _, err := VerifyEvidence(bad, w.State().Cluster()); kms.KindOf(err) != kms.Conflict {
		t.Errorf("a missing receipt is accepted: %v", err)
	}
	// A rotation after the removal that is for the removed node too.
	bad = clone(t, mustBuild(t, w, ids["without it"]))
	old := mustBuild(t, w, ids["with it"])
	bad.Decision, bad.Receipts = old.Decision, old.Receipts
	if _, err := VerifyEvidence(bad, w.State().Cluster()); err == nil {
		t.Error("a rotation for a removed node is accepted")
	}
}
