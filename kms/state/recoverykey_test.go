package state_test

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

var holders = []string{"de-1", "de-2", "fr-1", "fr-2", "jp-1"}

// withRecovery returns a cluster whose keyrings paris (fr alone) and europe (fr, de) have
// recovery keys, 3 of 5 from 2 sites.
func withRecovery(t *testing.T) *statetest.World {
	w := statetest.New(t, statetest.Options{})
	w.CreateKeyring("paris", "fr")
	w.CreateKeyring("europe", "fr", "de")
	w.GiveReceipts()
	w.Announce()
	w.SetRecovery("paris", w.RecoveryParams([]string{"fr"}, 3, 2, holders...))
	w.SetRecovery("europe", w.RecoveryParams([]string{"de", "fr"}, 3, 2, holders...))
	return w
}

func openRefused(t *testing.T, w *statetest.World, name string, p approval.RecoveryParams, kind kms.Kind, says string) {
	t.Helper()
	o := w.Proposal(kms.ActionRecoveryKey, approval.RecoveryTarget(name), p)
	r := w.Apply(w.Command(fr, state.OpenProposal{Proposal: o.Marshal()}, statetest.As(o.Proposer)))
	if r.Kind != kind || !strings.Contains(r.Message, says) {
		t.Errorf("%v, want %v %q", r.Err(), kind, says)
	}
}

// TestRecoveryKey sets recovery keys and gives the copies that they are for: each site
// its own, for every KEK version, and anew for a key that takes another's place.
func TestRecoveryKey(t *testing.T) {
	w := withRecovery(t)
	owes := func(node string, want ...state.Pending) {
		t.Helper()
		got := w.State().Unrecoverable(node)
		if len(got) != len(want) {
			t.Fatalf("%s owes %v, want %v", node, got, want)
		}
		for i := range want {
			if got[i] != want[i] {
				t.Fatalf("%s owes %v, want %v", node, got, want)
			}
		}
	}
	europe, paris := state.Pending{Keyring: "europe", Version: 1}, state.Pending{Keyring: "paris", Version: 1}
	owes("node-fr-1", europe, paris)
	owes("node-de-1", europe)
	owes("node-jp-1")
	w.Refuse(kms.NotResident, "node-jp-1", w.SealRecoveryCommand("node-jp-1", europe))
	w.Refuse(kms.NotResident, "node-de-1", w.SealRecoveryCommand("node-de-1", paris))
	stale := w.SealRecoveryCommand("node-fr-1", europe)
	stale.Number = 2
	w.Refuse(kms.Conflict, "node-fr-1", stale)
	w.Do("node-fr-1", w.SealRecoveryCommand("node-fr-1", europe))
	w.Refuse(kms.Exists, "node-fr-1", w.SealRecoveryCommand("node-fr-1", europe))
	restoreBoth(t, w.State())
	w.SealRecovery()
	owes("node-fr-1")
	owes("node-de-1")
	if c := w.State().RecoveryCopies("europe", 1); len(c) != 2 || c[0].Site != "de" || c[1].Site != "fr" {
		t.Errorf("copies %+v", c)
	}
	// A new KEK version and a new keyring come under it by themselves; a retired version's copies go.
	w.CreateKey("europe", "mail", kms.Encrypt)
	w.RotateKEK("europe")
	w.SealRecovery()
	if c := w.State().RecoveryCopies("europe", 1); len(c) != 0 {
		t.Errorf("copies of a retired KEK version are kept: %d", len(c))
	}
	if c := w.State().RecoveryCopies("europe", 2); len(c) != 2 {
		t.Errorf("the new KEK version has %d copies", len(c))
	}
	before := w.State()
	// Another key in its place: what the old one opens stays until all sites have sealed to the new one.
	w.SetRecovery("europe", w.RecoveryParams([]string{"de", "fr"}, 2, 2, "de-1", "jp-1", "jp-2"))
	again := state.Pending{Keyring: "europe", Version: 2}
	owes("node-fr-1", again)
	w.Do("node-fr-1", w.SealRecoveryCommand("node-fr-1", again))
	if c := w.State().RecoveryCopies("europe", 2); len(c) != 3 {
		t.Errorf("%d copies while one site has sealed to the new key, want 3", len(c))
	}
	restoreBoth(t, w.State())
	w.SealRecovery()
	if c := w.State().RecoveryCopies("europe", 2); len(c) != 2 || c[0].Number != 2 || c[1].Number != 2 {
		t.Errorf("copies %+v", c)
	}
	restoreBoth(t, w.State())
	if err := w.State().Extends(before); err != nil {
		t.Error(err)
	}
	if err := before.Extends(w.State()); err == nil {
		t.Error("a state without the new key extends the one with it")
	}
}

// TestRecoveryKeyRefused: who must agree, and what cannot be a recovery key.
func TestRecoveryKeyRefused(t *testing.T) {
	w := withRecovery(t)
	// Every site of the residency has to agree: its secrets are at stake.
	id := w.Propose(kms.ActionRecoveryKey, "recovery/europe", w.RecoveryParams([]string{"de", "fr"}, 3, 2, holders...))
	w.Approve(id, "jp-1", "jp-2", "de-1")
	progress(t, w, id, "open")
	w.Approve(id, "fr-1")
	w.Execute(id)

	openRefused(t, w, "other", w.RecoveryParams([]string{"fr"}, 3, 2, holders...), kms.Exists, "paris is for this residency")
	openRefused(t, w, "paris", w.RecoveryParams([]string{"jp"}, 3, 2, holders...), kms.Conflict, "another residency")
	openRefused(t, w, "mars", w.RecoveryParams([]string{"mars"}, 3, 2, holders...), kms.Conflict, "site mars")
	k, _ := w.State().RecoveryKeyOf("paris")
	openRefused(t, w, "paris", k.Params, kms.Conflict, "make a new one")
	stolen := w.RecoveryParams([]string{"fr"}, 3, 2, holders...)
	stolen.Holders[0].KEM = w.RecoveryParams([]string{"fr"}, 3, 2, "jp-2", "de-1").PublicKey
	openRefused(t, w, "paris", stolen, kms.BadSignature, "de-1 has not signed")
	moved := w.RecoveryParams([]string{"fr"}, 3, 2, holders...)
	moved.Holders[4].Site = "de"
	openRefused(t, w, "paris", moved, kms.Invalid, "jp-1")
	for says, p := range map[string]approval.RecoveryParams{
		"shares of 1 sites": w.RecoveryParams([]string{"fr"}, 3, 1, holders...),
		"shares of 4 sites": w.RecoveryParams([]string{"fr"}, 4, 4, holders...),
		"6 shares":          w.RecoveryParams([]string{"fr"}, 6, 2, holders...),
		"1 shares":          w.RecoveryParams([]string{"fr"}, 1, 2, holders...),
	} {
		openRefused(t, w, "paris", p, kms.Invalid, says)
	}
}

// TestRestore gives the next root of a node back, by a ceremony, what it had alone.
func TestRestore(t *testing.T) {
	w := withRecovery(t)
	w.SealRecovery()
	w.Replace("node-fr-1", true)
	paris := state.Pending{Keyring: "paris", Version: 1}
	c := w.NewCeremony("paris", "node-fr-1")
	good := w.RestoreCommand(c, "node-fr-1", paris, "de-1", "fr-1", "fr-2")
	refuse := func(kind kms.Kind, cmd state.RestoreCopy) {
		t.Helper()
		w.Refuse(kind, "node-jp-1", cmd)
	}
	refuse(kms.NeedsApproval, w.RestoreCommand(c, "node-fr-1", paris, "de-1", "fr-1"))
	refuse(kms.Denied, w.RestoreCommand(c, "node-fr-1", paris, "de-1", "fr-1", "jp-2")) // holds no share
	forged := good
	forged.Sealed = []byte("garbage")
	refuse(kms.BadSignature, forged)
	forged = good
	forged.Ceremony = w.NewCeremony("paris", "node-fr-1").Document.Marshal()
	refuse(kms.BadSignature, forged)
	refuse(kms.Conflict, w.RestoreCommand(w.NewCeremony("europe", "node-fr-1"), "node-fr-1", paris, "de-1", "fr-1", "fr-2"))
	other := w.NewCeremony("paris", "node-fr-1")
	other.Document.Recipients[0].Agreement = bytes.Repeat([]byte{1}, 32)
	refuse(kms.Denied, w.RestoreCommand(other, "node-fr-1", paris, "de-1", "fr-1", "fr-2"))

	// It may leave things behind, but not what a ceremony brings back.
	w.Do("node-de-1", w.ResealCommand("node-fr-1", state.Pending{Keyring: "europe", Version: 1}))
	w.Refuse(kms.Conflict, "node-fr-1", w.AdoptCommand("node-fr-1"))
	w.Do("node-jp-1", good)
	refuse(kms.Exists, good)
	restoreBoth(t, w.State())
	w.Advance(2 * time.Hour)
	late := w.RestoreCommand(c, "node-fr-1", paris, "de-1", "fr-1", "fr-2")
	refuse(kms.Expired, late)
	w.Do("node-fr-1", w.AdoptCommand("node-fr-1"))
	if n, _ := w.State().Node("node-fr-1"); n.Root != 2 {
		t.Errorf("root %d", n.Root)
	}
	restoreBoth(t, w.State())
}

// One nation's three custodians are too few sites.
func TestRestoreOneSite(t *testing.T) {
	w := statetest.New(t, statetest.Options{CustodiansPerSite: 3})
	w.CreateKeyring("paris", "fr")
	w.GiveReceipts()
	w.Announce()
	w.SetRecovery("paris", w.RecoveryParams([]string{"fr"}, 3, 2, "fr-1", "fr-2", "fr-3", "de-1", "jp-1"))
	w.SealRecovery()
	w.Replace("node-fr-1", false)
	c := w.NewCeremony("paris", "node-fr-1")
	paris := state.Pending{Keyring: "paris", Version: 1}
	w.Refuse(kms.NeedsApproval, "node-de-1", w.RestoreCommand(c, "node-fr-1", paris, "fr-1", "fr-2", "fr-3"))
	w.Do("node-de-1", w.RestoreCommand(c, "node-fr-1", paris, "fr-1", "fr-2", "jp-1"))
}

// TestRecoverySnapshot: a snapshot that names another recovery key, or one that nobody
// approved, is refused; one that leaves a copy out does not extend the state.
func TestRecoverySnapshot(t *testing.T) {
	w := withRecovery(t)
	w.SealRecovery()
	records := split(t, snapshot(t, w.State()))
	if tried := refusesAlterations(t, w.State(), "recovery-key", "recovery-copy"); tried < 10 {
		t.Errorf("only %d kinds of field tried", tried)
	}
	keys, copies := 0, 0
	for i, r := range records {
		switch r.number {
		case 40:
			keys++
			if _, err := state.Restore(bytes.NewReader(join(slices.Delete(slices.Clone(records), i, i+1))), no); err == nil {
				t.Error("a snapshot without an approved recovery key is taken")
			}
		case 41:
			copies++
			thin, err := state.Restore(bytes.NewReader(join(slices.Delete(slices.Clone(records), i, i+1))), no)
			if err != nil {
				t.Fatal(err)
			}
			if err := thin.Extends(w.State()); err == nil {
				t.Error("a state that has lost a copy for a recovery key extends the one with it")
			}
		}
	}
	if keys != 2 || copies != 3 {
		t.Errorf("%d recovery keys and %d copies in the snapshot", keys, copies)
	}
}
