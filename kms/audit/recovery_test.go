package audit

import (
	"bytes"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// TestEvidenceAfterRecovery: evidence from a later epoch holds the recovery between, and
// nothing of it can be left out or changed; evidence from before stays as it was.
func TestEvidenceAfterRecovery(t *testing.T) {
	w := statetest.New(t, statetest.Options{Sites: []string{"de", "fr", "jp"}})
	w.CreateKeyring("coalition", "de", "fr", "jp")
	w.GiveReceipts()
	w.CreateKey("coalition", "mail", kms.Encrypt)
	first := w.Rotate("coalition", "mail")
	before := mustBuild(t, w, first)
	w.Recover(w.State(), "node-de-1", "node-fr-1")
	w.Announce()
	second := w.Rotate("coalition", "mail")

	if again := mustBuild(t, w, first); !bytes.Equal(again.Marshal(), before.Marshal()) {
		t.Error("the evidence for a decision before the recovery is another")
	}
	e := mustBuild(t, w, second)
	if len(e.Recoveries) != 1 {
		t.Fatalf("%d recoveries in the evidence", len(e.Recoveries))
	}
	cluster := w.State().Cluster()
	if _, err := VerifyEvidence(e, cluster); err != nil {
		t.Fatal(err)
	}
	x := e
	x.Recoveries = nil
	if _, err := VerifyEvidence(x, cluster); err == nil {
		t.Error("accepted without the recovery")
	}
	for i := 0; i < len(e.Recoveries[0]); i += 101 {
		b := bytes.Clone(e.Recoveries[0])
		b[i] ^= 1
		x.Recoveries = [][]byte{b}
		if _, err := VerifyEvidence(x, cluster); err == nil {
			t.Errorf("accepted with byte %d of the recovery changed", i)
		}
	}
	x = before
	x.Recoveries = e.Recoveries
	if _, err := VerifyEvidence(x, cluster); err == nil {
		t.Error("accepted with a recovery that nothing belongs to")
	}
}
