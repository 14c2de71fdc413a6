package state_test

import (
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// TestRotation follows a rotation from proposal to the new primary version.
func TestRotation(t *testing.T) {
	w := statetest.New(t, statetest.Options{})
	w.CreateKeyring("coalition", "fr", "de", "jp")
	w.GiveReceipts()
	w.CreateKey("coalition", "mail", kms.Encrypt)
	id := w.Propose(kms.ActionRotate, approval.KeyTarget("coalition", "mail"), nil)
	w.Approve(id, "fr-1")
	if _, progress, _ := w.State().Decision(id); progress != string(state.Open) {
		t.Fatalf("progress %s after one approval", progress)
	}
	w.Approve(id, "de-1")
	if _, progress, _ := w.State().Decision(id); progress != string(state.Authorised) {
		t.Fatalf("progress %s after two approvals", progress)
	}
	w.Commit(id)
	v, _ := w.State().Version("coalition", "mail", 2)
	if v.State != kms.PreActive {
		t.Fatalf("version 2 is %s after the commit", v.State)
	}
	w.Advance(time.Minute)
	w.GiveReceipts()
	k, _ := w.State().Key("coalition", "mail")
	if k.Primary != 2 || k.Latest != 2 || k.Revision != 3 || k.Rotated != statetest.Start+60_000 {
		t.Fatalf("after the receipts: %+v", k)
	}
	if v, _ := w.State().Version("coalition", "mail", 1); v.State != kms.Active {
		t.Fatalf("version 1 is %s", v.State)
	}
}
