package engine

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/fakedevice"
)

// doomed is a world with keys of both protection levels at all nodes, in which the
// device of de is dead and its next root is approved; nothing is resealed yet.
func doomed(t *testing.T, leave bool) (w *world, as map[string]*Agent, next nextRoot) {
	t.Helper()
	w = newWorld(t, "")
	w.keyring("soft", "fr", "de", "jp")
	w.key("soft", "data", kms.Encrypt)
	w.hardware("hard", "fr", "de", "jp")
	w.threeKeys("hard")
	as = w.agents()
	w.settle(as)
	w.at("de").dev.Fail(func(string) error { return errors.New("dead") })
	delete(as, "de-1")
	next = newNextRoot(t)
	w.approveRoot(next, leave)
	return w, as, next
}

// approveRoot has the root of de approved, and carried out by jp.
func (w *world) approveRoot(next nextRoot, leave bool) {
	w.t.Helper()
	number := w.cluster.State().NextRoot("de-1")
	p := check[wire.Proposal](w.t)(w.at("fr").engine.OpenProposal(bg, caller("operator", "fr"), wire.OpenProposalRequest{
		Action: "node", Target: "node/de-1", Parameters: next.parameters(w, "de-1", leave), Reason: "the old one is dead"}))
	w.vote(p, approval.Approve, "fr-a", "de-a")
	check[state.Result](w.t)(w.at("jp").engine.submit(bg, attempt{expect: p.Content.Revision}, state.Execute{Proposal: p.ID}))
	if r, ok := w.cluster.State().Replacement("de-1"); !ok || r.Root != number {
		w.t.Fatalf("replacement %+v", r)
	}
}

// garble has a node seal something else to the next root of de in the place of all
// that it lacks: another KEK, another key of the right kind, a blob that no device
// loads, or no sealed copy at all.
func (w *world) garble(by string, next nextRoot) (n int) {
	w.t.Helper()
	st := w.cluster.State()
	r, _ := st.Replacement("de-1")
	to := keyring.Recipient{Node: "de-1", Suite: next.rec.Suite, PublicKey: next.rec.Agreement}
	for _, p := range st.Unsealed("de-1") {
		cmd := state.Reseal{Node: "de-1", Root: r.Root, Keyring: p.Keyring, Key: p.Key, Version: p.Version, Sealed: []byte("garbage")}
		k, _ := st.Key(p.Keyring, p.Key)
		switch {
		case p.Key == "":
			kek := must(keyring.GenerateKEK(make([]byte, keyring.EntropySize))) // not the keyring's
			copies := must(keyring.SealKEK([]keyring.Recipient{to}, keyring.KEKBinding{Cluster: st.Cluster(), Keyring: p.Keyring, Version: 1, Protection: kms.Software}, kek))
			kek.Destroy()
			cmd.Sealed = copies[0].Sealed
		case k.Purpose == kms.Encrypt && by == "jp":
		default:
			cmd.Sealed = must(keyring.SealVersion(to, bindingOf(st, k, p.Version), w.foreign(k, next, by)))
		}
		check[state.Result](w.t)(w.at(by).engine.submit(bg, attempt{}, cmd))
		n++
	}
	return n
}

// foreign returns a blob for the next device with another key than the version's.
func (w *world) foreign(k state.Key, next nextRoot, by string) []byte {
	w.t.Helper()
	if by == "jp" {
		return []byte("no blob")
	}
	dev := must(fakedevice.New(ecdh.P384()))
	var blobs [][]byte
	var unload func()
	var err error
	if k.Purpose == kms.Sign {
		blobs, _, _, unload, err = dev.GenerateSigner(bg, ecdh.P256(), [][]byte{next.rec.Import})
	} else {
		blobs, _, unload, err = dev.GenerateHMAC(bg, [][]byte{next.rec.Import})
	}
	if err != nil {
		w.t.Fatal(err)
	}
	unload()
	return blobs[0]
}

func bindingOf(st *state.State, k state.Key, version uint32) keyring.KeyBinding {
	return keyring.KeyBinding{Cluster: st.Cluster(), Keyring: k.Keyring, KeyID: kms.KeyID(k.ID), Version: version, Algorithm: k.Algorithm, Purpose: k.Purpose}
}

// rounds lets every rank of the agents have its turn.
func (w *world) rounds(as map[string]*Agent) {
	for range 3 {
		w.settle(as)
		w.clock.Advance(2 * time.Second)
	}
	w.settle(as)
}

// A node that seals other keys to the next root of a node whose device is dead, KEKs
// and first versions of protection hardware, is found out, named, and holds the
// replacement up once: another node seals the right ones.
func TestHostileReseals(t *testing.T) {
	w, as, next := doomed(t, false)
	fr, svc := w.at("fr").engine, caller("service", "fr")
	softCT := check[wire.EncryptResponse](t)(fr.Encrypt(bg, svc, "soft", "data", wire.EncryptRequest{Plaintext: []byte("soft")}))
	hardCT := check[wire.EncryptResponse](t)(fr.Encrypt(bg, svc, "hard", "encrypt", wire.EncryptRequest{Plaintext: []byte("hard")}))
	if n := w.garble("fr", next); n != 4 {
		t.Fatalf("%d copies", n)
	}
	var last AdoptionProgress
	a := next.adoption(w, "de-1", func(p AdoptionProgress) { last = p })
	next.dev.Fail(func(string) error { return errors.New("away") }) // is no reason to refuse
	_, err := a.step(bg)
	if wantKind(t, err, kms.Unavailable); len(w.cluster.State().Refused("de-1")) != 0 {
		t.Fatal("refused by a device that did not answer")
	}
	next.dev.Fail(nil)
	if done, err := a.step(bg); done || err != nil || last.Opened != 0 {
		t.Fatalf("with copies of other keys: %v, %v, %+v", done, err, last)
	}
	n := w.node("de-1")
	if n.Root != 1 || len(n.Refused) != 4 || n.Replacing.Missing != 4 || !strings.Contains(n.Replacing.Note, "fr-1") {
		t.Fatalf("node %+v, replacing %+v", n, n.Replacing)
	}
	for i, key := range []string{"encrypt", "mac", "sign", ""} {
		ring := map[bool]string{true: "soft", false: "hard"}[key == ""]
		if x := n.Refused[i]; x.Keyring != ring || x.Key != key || x.Version != 1 || x.SealedBy != "fr-1" || x.Root != 2 || x.Time.IsZero() {
			t.Errorf("refused %+v", x)
		}
	}
	// It does not get another turn.
	_, err = fr.submit(bg, attempt{}, state.Reseal{Node: "de-1", Root: 2, Keyring: "soft", Version: 1, Sealed: []byte("again")})
	wantKind(t, err, kms.Denied)
	w.rounds(map[string]*Agent{"fr-1": as["fr-1"]})
	if got := len(w.cluster.State().Unsealed("de-1")); got != 4 {
		t.Errorf("the agent of the node whose copies were refused has sealed: %d are missing", got)
	}
	var logged bytes.Buffer
	as["jp-1"].e.log = slog.New(slog.NewTextHandler(&logged, nil))
	w.rounds(as)
	if got := strings.Count(logged.String(), "sealed_by=fr-1"); got != 4 {
		t.Errorf("another node's log names who sealed %d times: %s", got, logged.String())
	}
	if done, err := a.step(bg); !done || err != nil || last.Opened != 4 || last.Refused != 4 {
		t.Fatalf("adoption: %v, %v, %+v", done, err, last)
	}
	if n := w.node("de-1"); n.Root != 2 || len(n.Refused) != 4 {
		t.Errorf("node %+v", n)
	}
	w.at("de").dev.Fail(nil)
	next.restart(w, "de-1")
	for ring, ct := range map[string][]byte{"soft/data": softCT.Ciphertext, "hard/encrypt": hardCT.Ciphertext} {
		r, k, _ := strings.Cut(ring, "/")
		d := check[wire.DecryptResponse](t)(w.at("de").engine.Decrypt(bg, caller("service", "de"), r, k, wire.DecryptRequest{Ciphertext: ct}))
		if string(d.Plaintext) != r {
			t.Errorf("%s: %q", ring, string(d.Plaintext))
		}
	}
	w.useHardware("hard", "de", "fr")
}

// The same while everything runs by itself: no turn of anybody is needed twice.
func TestHostileResealsRunning(t *testing.T) {
	w, as, next := doomed(t, false)
	w.garble("fr", next)
	done := make(chan error, 1)
	a := next.adoption(w, "de-1", nil)
	w.run(as)
	go func() { done <- a.Run(bg) }()
	w.await("adoption", func(st *state.State) bool { n, _ := st.Node("de-1"); return n.Root == 2 })
	if err := <-done; err != nil {
		t.Errorf("run: %v", err)
	}
	if got := len(w.cluster.State().Refused("de-1")); got != 4 {
		t.Errorf("%d refused", got)
	}
}

// When every node that could has sealed something else, it ends there, says so and
// what to do; a new proposal gives everybody another turn.
func TestEverybodyReseals(t *testing.T) {
	for _, leave := range []bool{false, true} {
		w, as, next := doomed(t, leave)
		var last AdoptionProgress
		a := next.adoption(w, "de-1", func(p AdoptionProgress) { last = p })
		for i, by := range []string{"fr", "jp"} {
			if n := w.garble(by, next); n != 4 {
				t.Fatalf("%d copies by %s", n, by)
			}
			if done, err := a.step(bg); done || err != nil {
				t.Fatalf("with the copies of %s: %v, %v", by, done, err)
			}
			if got := len(w.cluster.State().Refused("de-1")); got != 4*(i+1) {
				t.Fatalf("%d refused", got)
			}
		}
		before := w.cluster.State().Index()
		w.rounds(as)
		if got := w.cluster.State().Index(); got != before {
			t.Errorf("%d commands after everybody had a turn", got-before)
		}
		if leave { // it is what the custodians have said
			if done, err := a.step(bg); !done || err != nil || last.Left != 4 {
				t.Errorf("with leave: %v, %v, %+v", done, err, last)
			}
			continue
		}
		if done, err := a.step(bg); done || err != nil || last.Missing != 4 || last.Refused != 8 {
			t.Fatalf("%v, %v, %+v", done, err, last)
		}
		for _, words := range []string{"KEK of keyring soft", "key hard/encrypt", "fr-1", "jp-1", "prepare the next root anew", "leave", "destroy the version", "proved that the commitment is right", "1 more"} {
			if !strings.Contains(last.Note, words) || !strings.Contains(w.node("de-1").Replacing.Note, words) {
				t.Errorf("the note does not say %q: %s", words, last.Note)
			}
		}
		w.approveRoot(next, false)
		w.rounds(as)
		if done, err := a.step(bg); !done || err != nil || last.Root != 3 || last.Refused != 0 {
			t.Errorf("with the next number: %v, %v, %+v", done, err, last)
		}
	}
}

// racing is a cluster in which something happens just before a root is adopted.
type racing struct {
	nodeCluster
	before *func()
}

func (c racing) Propose(ctx context.Context, raw []byte) (state.Result, error) {
	envelope, _, err := state.Split(raw)
	if err != nil {
		return state.Result{}, err
	}
	if e, _, err := state.ParseEnvelope(envelope); err == nil && e.Type == state.TypeAdoptRoot && *c.before != nil {
		f := *c.before
		*c.before = nil
		f()
	}
	return c.nodeCluster.Propose(ctx, raw)
}

// A key that is created, or a copy that another takes the place of, between the
// check of the copies and the adoption: the node looks again before it adopts.
func TestAdoptsWhatItChecked(t *testing.T) {
	for _, c := range []struct {
		name   string
		leave  bool
		before func(w *world, as map[string]*Agent)
		opened int
		waits  bool
	}{
		{"a key created", false, func(w *world, _ map[string]*Agent) { w.key("hard", "late", kms.MAC) }, 5, true},
		{"a key created, with leave", true, func(w *world, _ map[string]*Agent) { w.key("hard", "late", kms.MAC) }, 5, true},
		{"created and resealed", false, func(w *world, as map[string]*Agent) { w.key("hard", "late", kms.MAC); w.rounds(as) }, 5, false},
		{"a keyring", false, func(w *world, as map[string]*Agent) { w.keyring("late", "fr", "de"); w.rounds(as) }, 5, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			w, as, next := doomed(t, c.leave)
			w.rounds(as)
			var last AdoptionProgress
			a := next.adoption(w, "de-1", func(p AdoptionProgress) { last = p })
			before := func() { c.before(w, as) }
			a.cfg.Cluster = racing{nodeCluster{w.cluster, w.at("de")}, &before}
			done, err := a.step(bg)
			if wantKind(t, err, kms.Unavailable); done || before != nil {
				t.Fatal("adopted other copies than were checked")
			}
			if n, _ := w.cluster.State().Node("de-1"); n.Root != 1 {
				t.Fatal("the root was adopted")
			}
			if c.waits {
				if done, err := a.step(bg); done || err != nil || last.Missing != 1 {
					t.Fatalf("without the late copy: %v, %v, %+v", done, err, last)
				}
				w.rounds(as)
			}
			if done, err := a.step(bg); !done || err != nil || last.Opened != c.opened {
				t.Errorf("%v, %v, %+v", done, err, last)
			}
		})
	}
}

// Every resident node proves the first version of a key of protection hardware. A
// node that commits to something else at the creation, which is in its power, shows:
// the receipt stays away, and no copy is good for a next root.
func TestFirstVersionProven(t *testing.T) {
	w := newWorld(t, "")
	w.hardware("hard", "fr", "de", "jp")
	w.threeKeys("hard")
	lie := check[state.CreateKey](t)(w.at("fr").engine.newKey(bg, w.cluster.State(), "hard", wire.CreateKeyRequest{Name: "lie", Purpose: "mac"}))
	lie.Checks[0].Hash = keyring.CheckHash(make([]byte, 32))
	check[state.Result](t)(w.at("fr").engine.submit(bg, attempt{principal: caller("operator", "fr").Identity.String()}, lie))
	as := w.agents()
	w.settle(as)
	received := func(key string) (nodes []string) {
		k := check[wire.Key](t)(w.at("fr").engine.Key(bg, caller("operator", "fr"), "hard", key))
		v := k.Versions[0]
		if len(v.Receipts) != 3 || v.State != "active" || !v.Primary {
			t.Errorf("version 1 of %s: %+v", key, v)
		}
		for _, r := range v.Receipts {
			if r.Received {
				nodes = append(nodes, r.Node)
			}
		}
		return nodes
	}
	for _, key := range []string{"encrypt", "mac", "sign"} {
		if got := received(key); len(got) != 3 {
			t.Errorf("receipts for %s: %v", key, got)
		}
	}
	if got := received("lie"); !slices.Equal(got, []string{"fr-1", "jp-1"}) {
		t.Errorf("receipts for the key with a false commitment: %v", got)
	}
	next := newNextRoot(t)
	w.approveRoot(next, false)
	var last AdoptionProgress
	a := next.adoption(w, "de-1", func(p AdoptionProgress) { last = p })
	for range 3 {
		w.rounds(as)
		if done, err := a.step(bg); done || err != nil {
			t.Fatalf("%v, %v", done, err)
		}
	}
	if last.Opened != 3 || last.Refused != 2 || !strings.Contains(last.Note, "never proved") || !strings.Contains(last.Note, "hard/lie") {
		t.Errorf("%+v", last)
	}
}
