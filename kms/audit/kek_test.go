package audit

import (
	"slices"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// TestEvidenceOfAKEKRotation builds and verifies evidence for rotations of a KEK, and
// refuses what was put together otherwise.
func TestEvidenceOfAKEKRotation(t *testing.T) {
	w := statetest.New(t, statetest.Options{})
	w.Announce()
	w.CreateKeyring("ring", "fr", "de", "jp")
	w.CreateKeyring("europe", "fr", "de")
	w.GiveReceipts()
	w.CreateKey("ring", "data", kms.Encrypt)
	id := w.ProposeKEK("ring")
	w.CommitKEK(id)
	if _, err := BuildEvidence(w.State(), id); kms.KindOf(err) != kms.Conflict {
		t.Errorf("before the receipts: %v", err)
	}
	w.GiveReceipts()
	w.FinishKEK("ring")
	another, elsewhere := w.RotateKEK("ring"), w.RotateKEK("europe")
	good, next, other := mustBuild(t, w, id), mustBuild(t, w, another), mustBuild(t, w, elsewhere)
	parsed, err := ParseEvidence(good.Marshal())
	if err != nil {
		t.Fatal(err)
	}
	r := verifies(t, w, parsed, 0)
	if r.Version != 2 || len(r.Receipts) != 3 || !says(r, "committed KEK version 2, sealed to node-de-1, node-fr-1, node-jp-1") || !says(r, "showing its key check value") {
		t.Errorf("report %+v", r)
	}
	key, _ := w.State().Key("ring", "data")
	for name, c := range map[string]struct {
		kind   kms.Kind
		change func(*Evidence)
	}{
		"a receipt missing":         {kms.Conflict, func(e *Evidence) { e.Receipts = e.Receipts[:2] }},
		"a receipt twice":           {kms.Invalid, func(e *Evidence) { e.Receipts = append(e.Receipts[:1:1], e.Receipts...) }},
		"another version's":         {kms.Invalid, func(e *Evidence) { e.Receipts = next.Receipts }},
		"another keyring's":         {kms.Invalid, func(e *Evidence) { e.Keyring = other.Keyring }},
		"another commit":            {kms.Invalid, func(e *Evidence) { e.Decision.Execution = next.Decision.Execution }},
		"a key":                     {kms.Invalid, func(e *Evidence) { e.Key = key.Statement }},
		"no keyring":                {kms.Invalid, func(e *Evidence) { e.Keyring = nil }},
		"a receipt in place of one": {kms.Invalid, func(e *Evidence) { e.Receipts = slices.Clone(e.Receipts); e.Receipts[0] = e.Keyring }},
	} {
		e := good
		c.change(&e)
		if _, err := VerifyEvidence(e, w.State().Cluster()); kms.KindOf(err) != c.kind {
			t.Errorf("%s: %v, want kind %v", name, err, c.kind)
		}
	}
	// A receipt that is signed with a root approved since.
	late := w.ProposeKEK("ring")
	w.CommitKEK(late)
	w.Rekey("node-jp-1")
	w.GiveReceipts()
	e := mustBuild(t, w, late)
	if len(e.Later) != 1 {
		t.Errorf("%d later decisions", len(e.Later))
	}
	verifies(t, w, e, 0)
	e.Later = []Decision{}
	if _, err := VerifyEvidence(e, w.State().Cluster()); err == nil {
		t.Error("a receipt verifies without the decision on its root")
	}
}
