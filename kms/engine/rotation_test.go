package engine

import (
	"context"
	"errors"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// run lets agents run until the test ends.
func (w *world) run(as map[string]*Agent) {
	ctx, cancel := context.WithCancel(bg)
	var wg sync.WaitGroup
	for _, a := range as {
		wg.Go(func() { a.Run(ctx) })
	}
	w.t.Cleanup(func() { cancel(); wg.Wait() })
}

// await waits until the state is as wanted; it fails after a generous while.
// Whenever nothing happens for a moment, a second passes on the fake clock.
func (w *world) await(what string, ok func(*state.State) bool) {
	w.t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		changed := w.cluster.Changed()
		if ok(w.cluster.State()) {
			return
		}
		select {
		case <-changed:
		case <-time.After(2 * time.Millisecond):
			w.clock.Advance(time.Second)
		case <-deadline:
			w.t.Fatalf("waited in vain for %s", what)
		}
	}
}

func primaryIs(ring, key string, n uint32) func(*state.State) bool {
	return func(st *state.State) bool {
		k, _ := st.Key(ring, key)
		return k.Primary == n
	}
}

// The whole story with agents that run by themselves.
func TestRotation(t *testing.T) {
	w := newWorld(t, "")
	w.run(w.agents())
	w.keyring("coalition", "fr", "de", "jp")
	w.await("receipts of the KEK", func(st *state.State) bool {
		k, _ := st.KEK("coalition", 1)
		return len(k.Receipts) == 3
	})
	for name, purpose := range map[string]kms.Purpose{"data": kms.Encrypt, "mac": kms.MAC, "sig": kms.Sign} {
		w.key("coalition", name, purpose)
	}
	fr, svc := w.at("fr").engine, caller("service", "fr")
	old := check[wire.EncryptResponse](t)(fr.Encrypt(bg, svc, "coalition", "data", wire.EncryptRequest{Plaintext: []byte("before")}))
	sig := check[wire.SignResponse](t)(fr.Sign(bg, svc, "coalition", "sig", wire.SignRequest{Message: []byte("m")}))

	for _, name := range []string{"data", "mac", "sig"} {
		p := w.propose(kms.ActionRotate, approval.KeyTarget("coalition", name), wire.ProposalParameters{})
		if p = w.vote(p, approval.Approve, "fr-a"); p.Met || p.Approvals != 1 {
			t.Fatalf("one approval: %+v", p)
		}
		if p = w.vote(p, approval.Approve, "jp-b"); !p.Met && p.Progress != "executed" {
			t.Fatalf("two approvals: %+v", p.Summary)
		}
		w.await("version 2 of "+name, primaryIs("coalition", name, 2))
		w.proven(p.ID)
	}
	k := check[wire.Key](t)(fr.Key(bg, caller("operator", "fr"), "coalition", "data"))
	if len(k.Versions) != 2 || k.Versions[1].State != "active" || !k.Versions[1].Primary || len(k.Versions[1].Receipts) != 3 {
		t.Fatalf("%+v", k)
	}
	for _, r := range k.Versions[1].Receipts {
		if !r.Received || r.Site == "" {
			t.Errorf("receipt %+v", r)
		}
	}
	now := check[wire.EncryptResponse](t)(fr.Rewrap(bg, svc, "coalition", "data", wire.RewrapRequest{Ciphertext: old.Ciphertext}))
	if now.KeyVersion != 2 {
		t.Errorf("rewrapped to version %d", now.KeyVersion)
	}
	for i, r := range []wire.EncryptResponse{old, now} {
		d := check[wire.DecryptResponse](t)(w.at("jp").engine.Decrypt(bg, caller("service", "jp"), "coalition", "data", wire.DecryptRequest{Ciphertext: r.Ciphertext}))
		if string(d.Plaintext) != "before" || d.KeyVersion != uint32(i+1) {
			t.Errorf("version %d: %d bytes", d.KeyVersion, len(d.Plaintext))
		}
	}
	v := check[wire.VerifyResponse](t)(fr.Verify(bg, svc, "coalition", "sig", wire.VerifyRequest{Message: []byte("m"), Signature: sig.Signature, KeyVersion: 1}))
	if !v.Valid {
		t.Error("the old version's signature no longer verifies")
	}
}

// proven verifies the evidence of a rotation offline.
func (w *world) proven(id string) {
	w.t.Helper()
	b := check[wire.Evidence](w.t)(w.at("de").engine.Evidence(bg, caller("auditor", "de"), id))
	e := check[audit.Evidence](w.t)(audit.ParseEvidence(b))
	check[audit.Report](w.t)(audit.VerifyEvidence(e, w.cluster.State().Cluster()))
}

// With the first in rank gone, the next one executes.
func TestExecutorIsReplaced(t *testing.T) {
	w := newWorld(t, "")
	as := w.agents()
	w.keyring("r", "fr", "de", "jp")
	w.key("r", "data", kms.Encrypt)
	w.settle(as)
	p := w.propose(kms.ActionRotate, approval.KeyTarget("r", "data"), wire.ProposalParameters{})
	w.vote(p, approval.Approve, "fr-a", "de-a")
	sp, _ := w.cluster.State().Proposal(p.ID)
	byRank := make([]string, 3)
	for id, a := range as {
		rank, ok := a.rank(w.cluster.State(), sp)
		if !ok {
			t.Fatalf("%s is not eligible", id)
		}
		byRank[rank] = id
	}
	committed := func() bool { k, _ := w.cluster.State().Key("r", "data"); return k.Latest == 2 }
	wait := as[byRank[1]].work(bg)
	if committed() || wait != 2*time.Second {
		t.Fatalf("the second did not wait, or %s", wait)
	}
	as[byRank[2]].work(bg)
	w.clock.Advance(2*time.Second - time.Millisecond)
	as[byRank[1]].work(bg)
	if committed() {
		t.Fatal("too soon")
	}
	w.clock.Advance(time.Millisecond)
	as[byRank[2]].work(bg)
	if committed() {
		t.Fatal("the third did not wait for the second")
	}
	as[byRank[1]].work(bg)
	if !committed() {
		t.Fatal("the second did not take over")
	}
	w.settle(as) // the first comes back: its late attempt harms nothing
	if k, _ := w.cluster.State().Key("r", "data"); k.Primary != 2 || k.Latest != 2 {
		t.Errorf("primary %d, latest %d", k.Primary, k.Latest)
	}
}

// TestNoReceiptForAnotherPublicKey: a hostile executor publishes a public key of its
// own with good material; no other node vouches for the version.
func TestNoReceiptForAnotherPublicKey(t *testing.T) {
	w := newWorld(t, "")
	as := w.agents()
	w.keyring("r", "fr", "de", "jp")
	w.key("r", "sig", kms.Sign)
	w.settle(as)
	p := w.propose(kms.ActionRotate, approval.KeyTarget("r", "sig"), wire.ProposalParameters{})
	w.vote(p, approval.Approve, "fr-a", "de-a")
	e, st := w.at("fr").engine, w.cluster.State()
	kr, _ := st.Keyring("r")
	k, _ := st.Key("r", "sig")
	old, _ := st.Version("r", "sig", 1)
	v, err := e.newVersion(bg, st, kr, keyring.KeyBinding{
		Cluster: st.Cluster(), Keyring: "r", KEK: kr.KEK, KeyID: kms.KeyID(k.ID), Version: 2, Algorithm: k.Algorithm, Purpose: k.Purpose,
	}, st.ResidentNodes("r"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := e.submit(bg, attempt{expect: k.Revision}, state.CommitRotation{
		Proposal: p.ID, Keyring: "r", Key: "sig", Version: 2, KEK: kr.KEK, Wrapped: v.wrapped, PublicKey: old.PublicKey, Checks: v.checks,
	}); err != nil {
		t.Fatal(err)
	}
	w.settle(as)
	if k, _ := w.cluster.State().Key("r", "sig"); k.Latest != 2 || k.Primary != 1 {
		t.Errorf("latest %d, primary %d", k.Latest, k.Primary)
	}
	if v, _ := w.cluster.State().Version("r", "sig", 2); len(v.Receipts) != 0 {
		t.Errorf("receipts of %d nodes for a public key that is not the key's", len(v.Receipts))
	}
}

// A rotation is not executed before its quorum, and a version not used before
// its receipts.
func TestReceiptsHoldBackTheNewVersion(t *testing.T) {
	w := newWorld(t, "")
	as := w.agents()
	w.keyring("r", "fr", "de", "jp")
	w.key("r", "data", kms.Encrypt)
	w.settle(as)
	broken := errors.New("bus error with secret detail")
	w.at("jp").dev.Fail(func(op string) error {
		if op == "ecdh" {
			return broken
		}
		return nil
	})
	w.at("jp").cache.Purge()
	p := w.propose(kms.ActionRotate, approval.KeyTarget("r", "data"), wire.ProposalParameters{})
	w.vote(p, approval.Approve, "fr-a", "de-a")
	for range 5 {
		for _, a := range as {
			a.work(bg)
		}
		w.clock.Advance(2 * time.Second)
	}
	k, _ := w.cluster.State().Key("r", "data")
	if k.Latest != 2 || k.Primary != 1 {
		t.Fatalf("latest %d, primary %d", k.Latest, k.Primary)
	}
	e, svc := w.at("fr").engine, caller("service", "fr")
	if r := check[wire.EncryptResponse](t)(e.Encrypt(bg, svc, "r", "data", wire.EncryptRequest{})); r.KeyVersion != 1 {
		t.Errorf("version %d is in use", r.KeyVersion)
	}
	view := check[wire.Key](t)(e.Key(bg, caller("operator", "fr"), "r", "data"))
	if view.Versions[1].State != "pre-active" || view.Versions[1].Receipts[2].Received {
		t.Errorf("%+v", view.Versions[1])
	}
	calls := w.at("jp").dev.Calls("ecdh")
	as["jp-1"].work(bg)
	as["jp-1"].work(bg)
	if n := w.at("jp").dev.Calls("ecdh") - calls; n > 1 {
		t.Errorf("a failing device was asked %d times without a pause", n)
	}
	w.at("jp").dev.Fail(nil)
	w.clock.Advance(MaxBackoff)
	w.settle(as)
	if k, _ := w.cluster.State().Key("r", "data"); k.Primary != 2 {
		t.Errorf("primary %d after the device came back", k.Primary)
	}
}

// Run survives everything that fails around it.
func TestAgentSurvives(t *testing.T) {
	w := newWorld(t, "")
	var failing atomic.Bool
	failing.Store(true)
	for _, n := range w.nodes {
		n.dev.Fail(func(string) error {
			if failing.Load() {
				return errors.New("unplugged")
			}
			return nil
		})
	}
	ticks := w.cluster.State().Index()
	w.run(w.agents())
	for range 3 {
		w.clock.Advance(5 * time.Second)
	}
	failing.Store(false)
	w.cluster.set(func(c *memoryCluster) { c.refuse = kms.Errorf(kms.Unavailable, "no leader") })
	w.clock.Advance(5 * time.Second)
	w.cluster.set(func(c *memoryCluster) { c.refuse = nil })
	w.await("ticks after the failures", func(st *state.State) bool { return st.Index() >= ticks+3 })
	w.keyring("r", "fr", "de", "jp")
	w.key("r", "data", kms.Encrypt)
	p := w.propose(kms.ActionRotate, approval.KeyTarget("r", "data"), wire.ProposalParameters{})
	w.vote(p, approval.Approve, "fr-a", "de-a")
	w.await("the rotation", primaryIs("r", "data", 2))
}

func TestScheduledRotation(t *testing.T) {
	w := newWorld(t, "")
	as := w.agents()
	w.keyring("r", "fr", "de")
	const day = 24 * time.Hour
	check[wire.Key](t)(w.at("fr").engine.CreateKey(bg, caller("operator", "fr"), "r", wire.CreateKeyRequest{
		Name: "data", Purpose: "encrypt", RotationPeriodMS: (30 * day).Milliseconds()}))
	w.settle(as)
	pass := func(d time.Duration) {
		w.clock.Advance(d)
		w.tick()
		for range 3 {
			w.settle(as)
			w.clock.Advance(scheduleEvery)
		}
	}
	pass(26 * day)
	if n := len(w.cluster.State().Proposals()); n != 0 {
		t.Fatalf("%d proposals four days before it is due", n)
	}
	pass(day + time.Hour)
	open := w.cluster.State().ProposalsOpen()
	if len(open) != 1 {
		t.Fatalf("%d proposals", len(open))
	}
	p := open[0].Content
	if p.Action != kms.ActionRotate || p.Target != "key/r/data" || !strings.Contains(p.Proposer, "/node/") || !strings.Contains(p.Reason, "30 days") {
		t.Errorf("%+v", p)
	}
	pass(time.Hour)
	if n := len(w.cluster.State().Proposals()); n != 1 {
		t.Errorf("%d proposals for one rotation", n)
	}
	pass(4 * day) // it expired unanswered: asked again, and the key is overdue
	if n := len(w.cluster.State().ProposalsOpen()); n != 1 {
		t.Errorf("%d proposals after the first expired", n)
	}
	s := check[wire.Status](t)(w.at("de").engine.Status(bg, caller("operator", "de")))
	if s.Keys.Overdue != 1 || s.Open != 1 || s.Keys.Keys != 1 {
		t.Errorf("%+v", s.Keys)
	}
	view, _ := proposalView(w.cluster.State(), w.cluster.State().ProposalsOpen()[0])
	w.vote(view, approval.Approve, "fr-a", "de-a")
	for range siteIDs {
		w.settle(as)
		w.clock.Advance(2 * time.Second)
	}
	w.settle(as)
	if k, _ := w.cluster.State().Key("r", "data"); k.Primary != 2 {
		t.Errorf("primary %d", k.Primary)
	}
}
