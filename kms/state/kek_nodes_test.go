package state_test

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/fxamacker/cbor/v2"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// TestKEKAndRootReplacement: a next root needs copies of both KEK versions, and loses
// those of the one that is retired meanwhile.
func TestKEKAndRootReplacement(t *testing.T) {
	w := kekWorld(t)
	at := &steady{t: t, w: w}
	w.Replace(fr, false)
	w.CommitKEK(w.ProposeKEK("ring"))
	w.GiveReceipts()
	want := []state.Pending{{Keyring: "ring", Version: 1}, {Keyring: "ring", Version: 2}}
	if got := w.State().Unsealed(fr); !slices.Equal(got, want) {
		t.Errorf("to be resealed: %v", got)
	}
	w.Reseal(fr)
	early := w.AdoptCommand(fr)
	at.step("resealed")
	w.FinishKEK("ring") // with the old root
	at.step("retired")
	if n := w.State().Resealed(fr); n != 1 {
		t.Errorf("%d statements of reseals", n)
	}
	refused(t, w, kms.Conflict, w.Command(fr, early)) // checked with a copy that is gone
	w.Do(fr, w.AdoptCommand(fr))
	at.step("adopted")
	// The other way round: the new root finishes what was begun under the old one.
	w.CommitKEK(w.ProposeKEK("ring"))
	w.GiveReceipts()
	b := w.Rewrap(fr, "ring", 2)
	w.Rekey(fr)
	at.step("rekeyed in the middle")
	w.Do(fr, statetest.ConfirmRewrapCommand(b))
	w.FinishKEK("ring")
	at.step("end")
	kek, _ := w.State().KEK("ring", 3)
	for _, c := range kek.Copies {
		if c.Node == fr && c.Root != 3 {
			t.Errorf("a copy for root %d", c.Root)
		}
	}
}

// TestKEKAndRemoval: a node that is removed holds nothing up, and its keyrings want a
// rotation until they have had one without it.
func TestKEKAndRemoval(t *testing.T) {
	w := statetest.New(t, statetest.Options{NodesPerSite: 2})
	at := &steady{t: t, w: w}
	w.Announce()
	w.CreateKeyring("ring", "fr", "de")
	w.GiveReceipts()
	w.CreateKey("ring", "a", kms.Encrypt)
	w.CommitKEK(w.ProposeKEK("ring"))
	const gone = "node-fr-2"
	for _, n := range w.State().ResidentNodes("ring") {
		if n.ID != gone {
			w.Do(n.ID, w.ReceiptCommand(n.ID, "ring", "", 2))
		}
	}
	if node, wanted := w.State().RotationWanted("ring"); wanted || keyring(t, w, "ring").KEK != 1 {
		t.Errorf("wanted because of %q", node)
	}
	w.RemoveNode(gone, false)
	at.step("removed before its receipt")
	if node, wanted := w.State().RotationWanted("ring"); !wanted || node != gone || keyring(t, w, "ring").KEK != 2 {
		t.Errorf("wanted %v because of %q", wanted, node)
	}
	w.CommitKEK(w.ProposeKEK("ring"))
	if _, wanted := w.State().RotationWanted("ring"); wanted {
		t.Error("still wanted")
	}
	w.GiveReceipts()
	b := w.Rewrap(fr, "ring", 9)
	for _, n := range w.State().ResidentNodes("ring") {
		if n.ID != "node-de-2" {
			w.Do(n.ID, statetest.ConfirmRewrapCommand(b))
		}
	}
	w.RemoveNode("node-de-2", false)
	at.step("removed before its confirmation")
	if got := under(w.State(), "ring"); got[3] != 1 {
		t.Errorf("under %v", got)
	}
	w.FinishKEK("ring")
	at.step("end")
}

// TestUntrustedRefusesAlteredKEKs alters every field of what a rotation leaves in a
// snapshot: one at its end and one in the middle.
func TestUntrustedRefusesAlteredKEKs(t *testing.T) {
	t.Parallel()
	w := statetest.New(t, statetest.Options{})
	w.Announce()
	w.CreateKeyring("attic", "fr", "de", "jp")
	w.GiveReceipts()
	for _, k := range []string{"w", "x", "y", "z"} {
		w.CreateKey("attic", k, kms.MAC)
	}
	w.RotateKEK("attic")
	w.CommitKEK(w.ProposeKEK("attic"))
	w.GiveReceipts()
	w.Do("node-jp-1", statetest.RefuseRewrapCommand(w.Rewrap("node-de-1", "attic", 1)))
	w.Rewrap(fr, "attic", 1)
	w.Confirm("attic")
	w.Do("node-de-1", statetest.ConfirmRewrapCommand(w.Rewrap(fr, "attic", 2)))
	s := w.State()
	if tried := refusesAlterations(t, s, "kek", "keyring", "version", "rewrap", "rewrap-refused"); tried < 100 {
		t.Errorf("only %d kinds of field tried", tried)
	}
	// What was rewrapped last may be kept back; a node that has seen more does not take it.
	records := split(t, snapshot(t, s))
	names := state.VerifiedTables()
	for i, r := range records {
		if names[r.number] != "rewrap-refused" {
			continue
		}
		thin, err := state.Restore(bytes.NewReader(join(slices.Delete(slices.Clone(records), i, i+1))), no)
		if err != nil {
			t.Fatal(err)
		}
		if err := thin.Extends(s); kms.KindOf(err) != kms.Conflict {
			t.Errorf("without the refusal: %v", err)
		}
	}
}

// TestKEKBeforeAllKnow: while some node's program does not know of rotations of KEKs,
// all refuse a proposal of one, as that program does.
func TestKEKBeforeAllKnow(t *testing.T) {
	w := statetest.New(t, statetest.Options{})
	w.CreateKeyring("ring", "fr", "de")
	p := w.Proposal(kms.ActionRotate, approval.KeyringTarget("ring"), nil)
	raw := w.Command(fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	refused(t, w, kms.Invalid, raw)
	w.Announce()
	id := w.ProposeKEK("ring")
	w.CommitKEK(id)
	if err := w.State().VerifyStatements(); err != nil {
		t.Error(err)
	}
}

// TestRestoreRefusesEarlyRetirement: a resident node signs the retirement of a KEK
// version that is in use, and makes a snapshot in which that happened.
func TestRestoreRefusesEarlyRetirement(t *testing.T) {
	w := primary(t)
	s := w.State()
	raw := w.Command("node-de-1", state.RetireKEK{Keyring: "ring", Version: 1})
	records := split(t, snapshot(t, s))
	names := state.VerifiedTables()
	for i, r := range records {
		if r.number == 0 { // one more leaf and entry, so that there is a place for it
			var h map[string]any
			if err := cbor.Unmarshal(r.body, &h); err != nil {
				t.Fatal(err)
			}
			h["index"] = h["index"].(uint64) + 1
			records[i].body = canon.Marshal(h)
		}
		var kek state.KEK
		if names[r.number] != "kek" || canon.Unmarshal(r.body, &kek) != nil || kek.Version != 1 {
			continue
		}
		kek.Copies, kek.RetiredAt, kek.RetiredIndex, kek.Retirement = nil, s.Clock(), s.Index()+1, raw
		records[i].body = canon.Marshal(kek)
	}
	_, err := state.Restore(bytes.NewReader(join(records)), no)
	if kms.KindOf(err) != kms.Invalid || !strings.Contains(err.Error(), "which is retired") {
		t.Errorf("%v", err)
	}
}
