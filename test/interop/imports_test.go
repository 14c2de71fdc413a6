package interop

import (
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// imports is a history of keys that were brought from outside, what became of them, and
// one whose import is erased with it.
func imports(t *testing.T) *statetest.World {
	w := statetest.New(t, statetest.Options{})
	w.Announce()
	w.CreateKeyring("coalition", "de", "fr", "jp")
	w.CreateHardwareKeyring("vault", "de", "fr")
	w.GiveReceipts()
	w.AllowImport()
	w.ImportKey("coalition", "data", kms.Encrypt)
	w.ImportKey("coalition", "stamp", kms.Sign)
	enrol(w, "fr-3", "fr", "fr-1", "de-1", "jp-1")
	w.ImportKey("vault", "code", kms.MAC)
	w.ImportKey("vault", "seal", kms.Sign)
	w.GiveReceipts()
	for _, key := range []string{"coalition/data", "coalition/stamp", "vault/code", "vault/seal"} {
		ring, name, _ := kms.SplitKeyPath(key)
		w.Rotate(ring, name)
	}
	w.Carry(kms.ActionSuspend, "key/coalition/stamp", nil)
	destroy(w, approval.KeyTarget("coalition", "data"), 1)
	w.Rotate("coalition", "data")
	return w
}
