package state_test

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// TestCompromisedDestroyed follows versions into both terminal states.
func TestCompromisedDestroyed(t *testing.T) {
	w := small(t)
	w.Rotate("europe", "mail")
	w.Rotate("europe", "mail")
	w.Carry(kms.ActionDeactivate, mail, approval.VersionParams{Version: 2})
	w.Carry(kms.ActionCompromise, mail, approval.VersionParams{Version: 1})
	want := func(n uint32, s kms.State) {
		t.Helper()
		if v, _ := w.State().Version("europe", "mail", n); v.State != s {
			t.Errorf("version %d is %s, want %s", n, v.State, s)
		}
	}
	destroy := func(n uint32) {
		t.Helper()
		id := w.Propose(kms.ActionDestroy, mail, approval.VersionParams{Version: n})
		w.ApproveAll(id)
		w.Advance(8 * 24 * time.Hour)
		w.Execute(id)
	}
	destroy(1)
	want(1, kms.DestroyedCompromised)
	destroy(2)
	want(2, kms.Destroyed)
	w.Carry(kms.ActionCompromise, mail, approval.VersionParams{Version: 2})
	want(2, kms.DestroyedCompromised)
	p := w.Proposal(kms.ActionDestroy, mail, approval.VersionParams{Version: 2})
	refused(t, w, kms.Conflict, w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer)))
	if err := w.State().VerifyStatements(); err != nil {
		t.Error(err)
	}
}

// TestOvertaken leaves a version pre-active that a later one has overtaken.
func TestOvertaken(t *testing.T) {
	w := small(t)
	first := w.Propose(kms.ActionRotate, mail, nil)
	w.ApproveAll(first)
	w.Commit(first)
	second := w.Propose(kms.ActionRotate, mail, nil)
	w.ApproveAll(second)
	w.Commit(second)
	for _, n := range []string{"node-fr-1", "node-de-1"} {
		w.Do(n, w.ReceiptCommand(n, "europe", "mail", 3))
	}
	w.GiveReceipts() // those for version 2
	k, _ := w.State().Key("europe", "mail")
	v, _ := w.State().Version("europe", "mail", 2)
	if k.Primary != 3 || v.State != kms.PreActive || len(v.Receipts) != 2 {
		t.Errorf("primary %d, version 2 is %s with %d receipts", k.Primary, v.State, len(v.Receipts))
	}
}

// TestConcurrentReads reads an old state, and checks commands against it, while
// it is applied to.
func TestConcurrentReads(t *testing.T) {
	w := small(t)
	old := w.State()
	hash := old.Hash()
	raws := make([][]byte, 50)
	for i := range raws {
		raws[i] = w.Command("node-fr-1", w.KeyCommand("europe", fmt.Sprintf("k%d", i), kms.MAC), statetest.As(w.Operator("fr")))
	}
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			s := old
			for _, raw := range raws {
				if err := old.Check(raw); err != nil {
					t.Errorf("Check: %v", err)
				}
				s, _ = s.Apply(s.Index()+1, raw)
			}
			if got := len(s.Keys("europe")); got != 51 {
				t.Errorf("%d keys", got)
			}
		})
		wg.Go(func() {
			for range 20 {
				if old.Hash() != hash || len(old.Keys("europe")) != 1 {
					t.Error("an old state changed")
				}
			}
		})
	}
	wg.Wait()
}

// TestLookups reads what the other tests do not.
func TestLookups(t *testing.T) {
	s := rich(t).State()
	k := key(t, s, "europe", "seal")
	if got, ok := s.KeyByID(kms.KeyID(k.ID)); !ok || got.Name != "seal" {
		t.Errorf("KeyByID: %+v", got)
	}
	if _, ok := s.KeyByID(kms.KeyID{}); ok {
		t.Error("a key with no id")
	}
	if n := s.ResidentNodes("europe"); len(n) != 2 || n[0].ID != "node-de-1" || n[1].ID != "node-fr-1" {
		t.Errorf("resident nodes %v", n)
	}
	if s.Resident("europe", "node-jp-1") || !s.Resident("coalition", "node-jp-1") || s.Resident("none", "node-jp-1") {
		t.Error("residency")
	}
	if len(s.KEKs("europe")) != 1 || len(s.Keyrings()) != 3 || len(s.Keys("coalition")) != 5 {
		t.Error("a list has the wrong length")
	}
	kek, ok := s.KEK("coalition", 1)
	if !ok || len(kek.Receipts) != 3 || len(kek.Copies) != 3 {
		t.Errorf("KEK: %d receipts", len(kek.Receipts))
	}
	l := s.Proposals()
	for i := 1; i < len(l); i++ {
		if l[i-1].Index <= l[i].Index {
			t.Error("proposals are not newest first")
		}
	}
	if _, _, ok := s.Decision("none"); ok {
		t.Error("a decision on no proposal")
	}
	if st, ok := s.NodeStatus("node-fr-1"); !ok || st.Time <= statetest.Start || len(st.Statement) == 0 {
		t.Errorf("status %+v", st)
	}
}
