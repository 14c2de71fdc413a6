package audit

import (
	"slices"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// The decision for a recovery key can be proven like any other, and names the sites
// that it had to have.
func TestEvidenceOfRecoveryKey(t *testing.T) {
	w := statetest.New(t, statetest.Options{})
	w.CreateKeyring("paris", "fr")
	w.GiveReceipts()
	w.Announce()
	id := w.SetRecovery("paris", w.RecoveryParams([]string{"fr"}, 3, 2, "de-1", "fr-1", "fr-2", "jp-1"))
	e, err := BuildEvidence(w.State(), id)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := VerifyEvidence(e, w.State().Cluster()); err != nil {
		t.Fatal(err)
	}
	// Without the approvals of the residency's own site it is nothing.
	e.Decision.Votes = slices.DeleteFunc(slices.Clone(e.Decision.Votes), func(s approval.Statement) bool { return strings.HasPrefix(s.Custodian, "fr-") })
	if _, err := VerifyEvidence(e, w.State().Cluster()); kms.KindOf(err) == 0 {
		t.Error("the evidence verifies without the site whose keys the recovery key opens")
	}
}
