package engine

import (
	"crypto/rand"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// kekRing makes a keyring at all sites with keys of each purpose and n more, and
// returns a ciphertext and a MAC made with them.
func kekRing(w *world, as map[string]*Agent, n int) (kept func(what string)) {
	w.t.Helper()
	w.keyring("ring", "fr", "de", "jp")
	w.threeKeys("ring")
	for i := range n {
		w.key("ring", fmt.Sprintf("more-%02d", i), kms.MAC)
	}
	w.settle(as)
	w.carry(as, kms.ActionRotate, approval.KeyTarget("ring", "encrypt"), wire.ProposalParameters{})
	fr, svc := w.at("fr").engine, caller("service", "fr")
	ct := check[wire.EncryptResponse](w.t)(fr.Encrypt(bg, svc, "ring", "encrypt", wire.EncryptRequest{Plaintext: []byte("kept")}))
	mac := check[wire.MACResponse](w.t)(fr.MAC(bg, svc, "ring", "mac", wire.MACRequest{Message: []byte("m")}))
	sig := check[wire.SignResponse](w.t)(fr.Sign(bg, svc, "ring", "sign", wire.SignRequest{Message: []byte("m")}))
	return func(what string) {
		w.t.Helper()
		for _, site := range siteIDs {
			w.at(site).cache.Purge()
			e, svc := w.at(site).engine, caller("service", site)
			d, err := e.Decrypt(bg, svc, "ring", "encrypt", wire.DecryptRequest{Ciphertext: ct.Ciphertext})
			if err != nil || string(d.Plaintext) != "kept" {
				w.t.Fatalf("%s: %s does not decrypt: %v", what, site, err)
			}
			again, err := e.MAC(bg, svc, "ring", "mac", wire.MACRequest{Message: []byte("m")})
			if err != nil || string(again.MAC) != string(mac.MAC) {
				w.t.Fatalf("%s: %s computes another MAC: %v", what, site, err)
			}
			v, err := e.Verify(bg, svc, "ring", "sign", wire.VerifyRequest{Message: []byte("m"), Signature: sig.Signature, KeyVersion: 1})
			if err != nil || !v.Valid {
				w.t.Fatalf("%s: %s does not verify: %v", what, site, err)
			}
			check[wire.SignResponse](w.t)(e.Sign(bg, svc, "ring", "sign", wire.SignRequest{Message: []byte("n")}))
		}
	}
}

// announce lets every node say what its program knows.
func (w *world) announce(as map[string]*Agent) {
	w.t.Helper()
	w.settle(as)
	if lacking := w.cluster.State().Lacking(state.CommandKind{Type: state.TypeRewrap, Version: 1}); len(lacking) > 0 {
		w.t.Fatalf("%v have not announced what they know", lacking)
	}
}

// inBatches makes agents rewrap n key versions at a time.
func inBatches(as map[string]*Agent, n int) {
	for _, a := range as {
		a.cfg.Batch = n
	}
}

// turns steps the agents until every rank has had its turn.
func (w *world) turns(as map[string]*Agent) {
	for range len(siteIDs) + 1 {
		w.settle(as)
		w.clock.Advance(2 * time.Second)
	}
	w.settle(as)
}

func (w *world) ringView(name string) wire.Keyring {
	w.t.Helper()
	return check[wire.Keyring](w.t)(w.at("fr").engine.Keyring(bg, caller("operator", "fr"), name))
}

// TestKEKRotation rotates a KEK while the executing node stops in the middle, and
// keys are made and rotated.
func TestKEKRotation(t *testing.T) {
	w := newWorld(t, "")
	as := w.agents()
	w.announce(as)
	kept := kekRing(w, as, 12)
	if v := w.ringView("ring"); v.KEK != 1 || v.Rotation != nil {
		t.Fatalf("before: %+v", v)
	}
	p := w.propose(kms.ActionRotate, approval.KeyringTarget("ring"), wire.ProposalParameters{})
	if v := w.ringView("ring"); v.Rotation == nil || len(v.Rotation.Proposals) != 1 || v.Rotation.Proposals[0] != p.ID {
		t.Errorf("proposed: %+v", v.Rotation)
	}
	w.vote(p, approval.Approve, "fr-a", "de-a")
	// Agents of two nodes alone: nobody can do without jp's receipt.
	two := map[string]*Agent{"fr-1": as["fr-1"], "de-1": as["de-1"]}
	inBatches(as, 4)
	w.turns(two)
	v := w.ringView("ring")
	if v.KEK != 1 || v.Rotation == nil || v.Rotation.Target != 2 || len(v.Rotation.Awaits) != 1 || v.Rotation.Awaits[0] != "jp-1" || !strings.Contains(v.Rotation.Note, "receipts of jp-1") {
		t.Fatalf("without jp's receipt: %+v", v.Rotation)
	}
	kept("without jp's receipt")
	check[wire.Key](t)(w.at("de").engine.CreateKey(bg, caller("operator", "de"), "ring", wire.CreateKeyRequest{Name: "early", Purpose: "mac"}))
	as["jp-1"].work(bg)
	if v := w.ringView("ring"); v.KEK != 2 {
		t.Fatalf("with all receipts: %+v", v)
	}
	check[wire.Key](t)(w.at("de").engine.CreateKey(bg, caller("operator", "de"), "ring", wire.CreateKeyRequest{Name: "late", Purpose: "mac"}))
	// One node rewraps and stops; jp is away.
	w.turns(map[string]*Agent{"fr-1": as["fr-1"]})
	v = w.ringView("ring")
	if r := v.Rotation; r.Done != 1 || r.Rewrapped == 0 || r.Left+r.Rewrapped+r.Done != r.Versions || r.Versions != 18 {
		t.Fatalf("one node alone: %+v", r)
	}
	kept("in the middle")
	// The process is started anew, everywhere: the state alone says what is left.
	as = w.agents()
	inBatches(as, 4)
	w.carry(as, kms.ActionRotate, approval.KeyTarget("ring", "encrypt"), wire.ProposalParameters{})
	w.turns(as)
	kept("at the end")
	if v := w.ringView("ring"); v.KEK != 2 || v.Rotation != nil {
		t.Fatalf("at the end: %+v", v.Rotation)
	}
	old, _ := w.cluster.State().KEK("ring", 1)
	if !old.Retired() || len(old.Copies) != 0 {
		t.Errorf("the old one: %+v", old)
	}
	w.proven(p.ID)
	for _, n := range w.nodes {
		if s := n.cache.Stats(); s.KEKs > 1 {
			t.Errorf("%s has %d KEKs open", n.id, s.KEKs)
		}
	}
	for range 2 { // and again, in one go
		w.proven(w.carry(as, kms.ActionRotate, approval.KeyringTarget("ring"), wire.ProposalParameters{}).ID)
		w.turns(as)
		kept("another")
	}
	if v := w.ringView("ring"); v.KEK != 4 || v.Rotation != nil {
		t.Errorf("after three: %+v", v)
	}
}

// TestHostileRewrapper: a resident node wraps other keys, and garbage. Nothing is lost,
// the other nodes refuse and name it, another one rewraps.
func TestHostileRewrapper(t *testing.T) {
	w := newWorld(t, "")
	as := w.agents()
	w.announce(as)
	kept := kekRing(w, as, 3)
	p := w.propose(kms.ActionRotate, approval.KeyringTarget("ring"), wire.ProposalParameters{})
	w.vote(p, approval.Approve, "fr-a", "de-a")
	proposal, _ := w.cluster.State().Proposal(p.ID)
	if err := as["fr-1"].execute(bg, proposal); err != nil {
		t.Fatal(err)
	}
	for _, a := range as { // until it is primary, and nothing is rewrapped
		if err := a.receipt(bg, w.cluster.State(), state.Pending{Keyring: "ring", Version: 2}); err != nil {
			t.Fatal(err)
		}
	}
	hostile := w.at("de").engine
	swap := func(version uint32) []byte { // what another key holds, wrapped as it should be for this one
		st := w.cluster.State()
		kr, _ := st.Keyring("ring")
		keks := as["de-1"].openKEKs(st, kr)
		defer keks.release()
		v, _ := st.Version("ring", "mac", 1)
		b := check[keyring.KeyBinding](t)(keyBinding(st, v))
		old, next := must(keks.get(bg, 1)), must(keks.get(bg, 2))
		m := must(keyring.UnwrapMaterial(old, b, v.Wrapped))
		defer m.Destroy()
		victim, _ := st.Version("ring", "more-00", version)
		to := check[keyring.KeyBinding](t)(keyBinding(st, victim))
		to.KEK = 2
		return must(keyring.WrapMaterial(next, to, m))
	}
	garbage := make([]byte, 61)
	_, _ = rand.Read(garbage)
	for i, wrapped := range [][]byte{swap(1), garbage} {
		st := w.cluster.State()
		items := []state.RewrapItem{{Key: "more-00", Version: 1, Wrapped: wrapped}}
		err := as["de-1"].submitRewrap(bg, st, state.Keyring{Name: "ring", KEK: 2}, items)
		if i == 1 {
			if wantKind(t, err, kms.Denied); !strings.Contains(err.Error(), "de-1") {
				t.Errorf("%q", err)
			}
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		b := w.cluster.State().OpenBatches("ring")[0]
		check[state.Result](t)(hostile.submit(bg, attempt{}, state.ConfirmRewrap{Keyring: "ring", KEK: 2, Batch: b.Index, Digest: b.Digest}))
		kept("with garbage in the state")
		as["fr-1"].work(bg)
		kept("refused")
	}
	v := w.ringView("ring")
	if r := v.Rotation; len(r.Refused) != 1 || r.Refused[0].Rewrapped != "de-1" || r.Refused[0].Refused != "fr-1" || r.Refused[0].Key != "more-00" || r.Done != 0 {
		t.Fatalf("shown as %+v", v.Rotation)
	}
	w.turns(as)
	kept("at the end")
	if v := w.ringView("ring"); v.Rotation != nil || v.KEK != 2 {
		t.Errorf("at the end: %+v", v.Rotation)
	}
	mac := func(site string) []byte {
		return check[wire.MACResponse](t)(w.at(site).engine.MAC(bg, caller("service", site), "ring", "more-00", wire.MACRequest{Message: []byte("m")})).MAC
	}
	if string(mac("fr")) != string(mac("de")) || string(mac("fr")) != string(mac("jp")) {
		t.Error("the key differs from site to site")
	}
}

// TestVersionThatNeverOpened: what one node once committed as garbage does not stop
// the others' rewrap; it keeps its KEK version until it is destroyed.
func TestVersionThatNeverOpened(t *testing.T) {
	w := newWorld(t, "")
	as := w.agents()
	w.announce(as)
	kept := kekRing(w, as, 1)
	id := make([]byte, state.KeyIDSize)
	id[0] = 9
	check[state.Result](t)(w.at("jp").engine.submit(bg, attempt{principal: caller("operator", "jp").Identity.String()}, state.CreateKey{
		Keyring: "ring", Name: "bad", ID: id, Purpose: kms.MAC, Algorithm: kms.HMACSHA256, KEK: 1, Wrapped: make([]byte, 61)}))
	w.carry(as, kms.ActionRotate, approval.KeyringTarget("ring"), wire.ProposalParameters{})
	w.turns(as)
	kept("all but one")
	v := w.ringView("ring")
	if r := v.Rotation; r == nil || r.Left != 1 || r.Done != r.Versions-1 || r.Rewrapped != 0 {
		t.Fatalf("%+v", v.Rotation)
	}
	p := w.propose(kms.ActionDestroy, approval.KeyTarget("ring", "bad"), wire.ProposalParameters{})
	w.vote(p, approval.Approve, "fr-a", "de-a")
	w.clock.Advance(8 * 24 * time.Hour)
	w.tick()
	w.turns(as)
	if v := w.ringView("ring"); v.Rotation != nil {
		t.Errorf("%+v", v.Rotation)
	}
}

// TestKEKOfHardware says what to do instead.
func TestKEKOfHardware(t *testing.T) {
	w := newWorld(t, "")
	w.hardware("hard", "fr", "de")
	early := wire.OpenProposalRequest{Action: "rotate", Target: approval.KeyringTarget("hard"), Reason: "because of the test"}
	_, err := w.at("de").engine.OpenProposal(bg, caller("operator", "de"), early)
	if wantKind(t, err, kms.Invalid); !strings.Contains(err.Error(), "announced") {
		t.Errorf("before all nodes know it: %q", err)
	}
	w.announce(w.agents())
	_, err = w.at("de").engine.OpenProposal(bg, caller("operator", "de"), wire.OpenProposalRequest{
		Action: "rotate", Target: approval.KeyringTarget("hard"), Reason: "because of the test"})
	if wantKind(t, err, kms.Conflict); !strings.Contains(err.Error(), "rotate its keys") {
		t.Errorf("%q", err)
	}
	_, err = w.at("de").engine.OpenProposal(bg, caller("operator", "de"), wire.OpenProposalRequest{
		Action: "rotate", Target: approval.KeyringTarget("none"), Reason: "because of the test"})
	wantKind(t, err, kms.NotFound)
}

// TestKEKDevicesFail: a device that does not answer is waited for, and then it goes on.
func TestKEKDevicesFail(t *testing.T) {
	w := newWorld(t, "")
	as := w.agents()
	w.announce(as)
	kept := kekRing(w, as, 2)
	p := w.propose(kms.ActionRotate, approval.KeyringTarget("ring"), wire.ProposalParameters{})
	w.vote(p, approval.Approve, "fr-a", "de-a")
	w.at("jp").dev.Fail(func(op string) error {
		if op == "ecdh" {
			return fmt.Errorf("bus error")
		}
		return nil
	})
	w.turns(as)
	if v := w.ringView("ring"); v.KEK != 1 || v.Rotation.Note == "" {
		t.Errorf("%+v", v)
	}
	w.at("jp").dev.Fail(nil)
	w.clock.Advance(MaxBackoff)
	w.turns(as)
	kept("at the end")
	if v := w.ringView("ring"); v.KEK != 2 || v.Rotation != nil {
		t.Errorf("%+v", v.Rotation)
	}
}
