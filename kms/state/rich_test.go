package state_test

import (
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/pqc"
)

func target(key string) string { return approval.TargetKey + "/coalition/" + key }

// rich returns a cluster in which everything has happened at least once.
func rich(t testing.TB) *statetest.World {
	w := statetest.New(t, statetest.Options{})
	w.Do("node-jp-1", state.Program("before"))
	w.Announce()
	w.CreateKeyring("coalition", "fr", "de", "jp")
	w.CreateKeyring("europe", "fr", "de")
	w.GiveReceipts()
	w.AllowImport()
	w.ImportKey("coalition", "brought", kms.Encrypt)
	for _, k := range []string{"mail", "vpn", "old", "gone"} {
		w.CreateKey("coalition", k, kms.Encrypt)
	}
	w.CreateKey("europe", "seal", kms.Sign)
	w.Rotate("coalition", "mail")
	w.Rotate("coalition", "old")
	w.Advance(time.Minute)
	w.Rotate("coalition", "old")
	w.Rotate("coalition", "gone")
	// Protection hardware, and a node's root replaced.
	w.CreateHardwareKeyring("vault", "fr", "de")
	w.CreateKey("vault", "code", kms.MAC)
	w.GiveReceipts()
	for _, k := range []string{"sig", "lost"} {
		w.CreateKey("vault", k, kms.Sign)
		w.Rotate("vault", k)
	}
	w.Rekey("node-de-1")
	w.Carry(kms.ActionSuspend, target("vpn"), nil)
	w.Carry(kms.ActionResume, target("vpn"), nil)
	w.Carry(kms.ActionSuspend, target("vpn"), nil)
	w.Carry(kms.ActionDeactivate, target("mail"), approval.VersionParams{Version: 1})
	w.Carry(kms.ActionCompromise, target("mail"), approval.VersionParams{Version: 1})
	// Destruction of one version, of a whole key, and one that is cancelled.
	one := w.Propose(kms.ActionDestroy, target("old"), approval.VersionParams{Version: 2})
	all := w.Propose(kms.ActionDestroy, target("gone"), approval.VersionParams{})
	hard := w.Propose(kms.ActionDestroy, "key/vault/lost", approval.VersionParams{})
	w.ApproveAll(hard)
	no := w.Propose(kms.ActionDestroy, target("mail"), approval.VersionParams{Version: 1})
	w.ApproveAll(one)
	w.ApproveAll(all)
	w.ApproveAll(no)
	w.Vote(no, "jp-1", approval.Reject)
	w.Advance(8 * 24 * time.Hour)
	w.Execute(one)
	w.Execute(all)
	w.Execute(hard)
	// Custodians come, change keys and go.
	w.Carry(kms.ActionCustodian, "custodian/fr-9", approval.CustodianParams{Custodian: statetest.Record("fr-9", "fr", 0, w.AddCustodianKey("fr-9"))})
	leaving := statetest.Record("jp-2", "jp", 0, w.Custodian("jp-2"))
	leaving.Revoked = true
	w.Carry(kms.ActionCustodian, "custodian/jp-2", approval.CustodianParams{Custodian: leaving})
	// A credential is suspended, restored and suspended again.
	w.SuspendCredential("fr-9", "fr-1")
	w.Carry(kms.ActionCustodian, "custodian/fr-9", w.RestoreParams("fr-9"))
	w.SuspendCredential("fr-9", "fr-2")
	// A policy change voids what was open under the policy.
	w.Propose(kms.ActionRotate, target("mail"), nil)
	rules := statetest.Policies(3)[1].Rules
	rules[5].Delay = time.Hour.Milliseconds()
	w.Carry(kms.ActionPolicy, "policy/standard", approval.PolicyParams{Rules: rules})
	special := grouped(approval.Group{Need: 1, Groups: []approval.Group{
		{Need: 2, Weight: 1, Custodians: []approval.Weight{{Name: "de-1", Weight: 2}, {Name: "fr-1", Weight: 1}}, Sites: []approval.SiteWeight{{Name: "jp", Weight: 1, Approvals: 1}}}}})
	special.Rules[2].Unused, special.Forbid = time.Hour.Milliseconds(), []uint16{uint16(pqc.Ed25519)}
	w.Carry(kms.ActionPolicy, "policy/grouped", special)
	checkpoints(w)
	unfinished(w)
	w.Do("node-fr-1", w.UseCommand("coalition", "mail", 2, w.Now()))
	w.Do("node-de-1", w.UseCommand("europe", "seal", 1, w.Now()))
	return w
}

// checkpoints has nodes submit and cosign checkpoints, under roots and keys that change.
func checkpoints(w *statetest.World) {
	for _, id := range w.NodeIDs() {
		w.Do(id, w.RegisterCommand(id))
	}
	w.Do("node-fr-1", w.CheckpointCommand("node-fr-1", w.Grow("node-fr-1", 3)))
	w.Do("node-jp-1", w.CosignCommand("node-jp-1", "node-fr-1"))
	w.Do("node-jp-1", w.RegisterCommand("node-jp-1"))
	w.Do("node-de-1", w.CosignCommand("node-de-1", ""))
	w.Advance(time.Second)
	w.Do("node-fr-1", w.CheckpointCommand("node-fr-1", w.Grow("node-fr-1", 2)))
	w.Rekey("node-de-1")
	w.Do("node-de-1", w.CosignCommand("node-de-1", "node-fr-1"))
	w.Do("node-de-1", w.CheckpointCommand("node-de-1", w.Grow("node-de-1", 2)))
	w.Advance(time.Second)
	w.Do("node-de-1", w.CheckpointCommand("node-de-1", w.AccessLog("node-de-1").Fork(1)))
}

// unfinished leaves proposals and a root on their way.
func unfinished(w *statetest.World) {
	// Open, withdrawn, authorised, committed.
	w.Propose(kms.ActionCompromise, target("vpn"), approval.VersionParams{Version: 1})
	withdrawn := w.Propose(kms.ActionResume, target("vpn"), nil)
	w.Approve(withdrawn, "fr-1", "de-1", "fr-2")
	w.Vote(withdrawn, "fr-1", approval.Reject)
	waiting := w.Propose(kms.ActionRotate, "key/europe/seal", nil)
	w.ApproveAll(waiting)
	w.Advance(2 * time.Hour)
	w.Commit(waiting)
	w.Do("node-de-1", w.ReceiptCommand("node-de-1", "europe", "seal", 2))
	// A root on its way: some of its copies are there.
	w.Replace("node-fr-1", false)
	for _, p := range w.State().Unsealed("node-fr-1")[1:] {
		w.Do(w.Resealer("node-fr-1", p.Keyring), w.ResealCommand("node-fr-1", p))
	}
	for _, p := range []state.Pending{{Keyring: "europe", Version: 1}, {Keyring: "vault", Key: "code", Version: 1}} {
		w.Do("node-fr-1", w.RefuseCommand("node-fr-1", p, "node-de-1"))
	}
}

func key(t *testing.T, s *state.State, ring, name string) state.Key {
	t.Helper()
	k, ok := s.Key(ring, name)
	if !ok {
		t.Fatalf("no key %s/%s", ring, name)
	}
	return k
}

func TestRich(t *testing.T) {
	s := rich(t).State()
	versions := map[string][]kms.State{
		"mail": {kms.Compromised, kms.Active},
		"vpn":  {kms.Active},
		"old":  {kms.Active, kms.Destroyed, kms.Active},
		"gone": {kms.Destroyed, kms.Destroyed},
	}
	for name, want := range versions {
		vs := s.Versions("coalition", name)
		for i, v := range vs {
			if v.State != want[i] {
				t.Errorf("%s version %d is %s, want %s", name, i+1, v.State, want[i])
			}
			if v.State.Gone() != (len(v.Wrapped) == 0) || v.State.Gone() != (len(v.Statement) == 0) || v.State.Gone() != (len(v.Erased) == 32) {
				t.Errorf("%s version %d is %s: wrapped %d, statement %d, erased %d bytes", name, i+1, v.State, len(v.Wrapped), len(v.Statement), len(v.Erased))
			}
		}
		if len(vs) != len(want) {
			t.Errorf("%s has %d versions, want %d", name, len(vs), len(want))
		}
	}
	if k := key(t, s, "coalition", "gone"); k.Primary != 0 || len(k.Statement) != 0 {
		t.Errorf("destroyed key: primary %d, statement of %d bytes", k.Primary, len(k.Statement))
	}
	if k := key(t, s, "coalition", "vpn"); !k.Suspended || k.Revision != 4 {
		t.Errorf("vpn: %+v", k)
	}
	count := map[state.Progress]int{}
	for _, p := range s.Proposals() {
		count[p.Progress]++
	}
	if count[state.Void] != 1 || count[state.Rejected] != 1 || count[state.Open] != 1 || count[state.Authorised] != 1 {
		t.Errorf("proposals by progress: %v", count)
	}
	if got := s.Pending("node-fr-1"); len(got) != 1 || got[0] != (state.Pending{Keyring: "europe", Key: "seal", Version: 2}) {
		t.Errorf("pending at node-fr-1: %v", got)
	}
	if got := s.Pending("node-jp-1"); len(got) != 0 {
		t.Errorf("pending at node-jp-1: %v", got)
	}
	if len(s.ProposalsOpen()) != 2 {
		t.Errorf("%d open proposals", len(s.ProposalsOpen()))
	}
}
