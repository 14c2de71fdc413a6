package engine

import (
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// A node that may leave things behind waits for what a recovery ceremony can bring back, as
// the state machine does, and says what is in the way.
func TestWhatACeremonyBringsIsNotLeft(t *testing.T) {
	const node = "node-fr-1"
	for _, recovery := range []bool{false, true} {
		w := statetest.New(t, statetest.Options{})
		w.CreateKeyring("paris", "fr")
		w.GiveReceipts()
		w.Announce()
		if recovery {
			w.SetRecovery("paris", w.RecoveryParams([]string{"fr"}, 2, 2, "fr-1", "de-1"))
			w.SealRecovery()
		}
		w.Replace(node, true)
		w.Advance(leaveAfter*time.Millisecond + time.Minute)
		st := w.State()
		r, _ := st.Replacement(node)
		left := state.Pending{Keyring: "paris", Version: 1}
		if got := leaves(st, r, left); got == recovery {
			t.Errorf("recovery key %v: left behind %v", recovery, got)
		}
		if note := hindrance(st, r); recovery && !strings.Contains(note, "conclave ceremony run paris") {
			t.Errorf("the note is %q", note)
		}
		res := w.Apply(w.Command(node, w.AdoptCommand(node)))
		if (res.Err() == nil) == recovery {
			t.Errorf("recovery key %v: the state machine says %v", recovery, res.Err())
		}
	}
}
