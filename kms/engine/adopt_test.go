package engine

import (
	"context"
	"crypto/ecdh"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/test/fakedevice"
)

// nextRoot is a hardware root that a node is to have next.
type nextRoot struct {
	dev  *fakedevice.Device
	root *keyring.Root
	rec  approval.NodeRoot
}

func newNextRoot(t testing.TB) nextRoot {
	t.Helper()
	n := nextRoot{dev: must(fakedevice.New(ecdh.P384()))}
	seed := must(pqc.GenerateSeed(nil))
	defer seed.Destroy()
	n.root = must(keyring.NewRoot(n.dev, pqc.MLKEM1024P384, seed))
	kind, public := n.dev.ImportKey()
	n.rec = approval.NodeRoot{
		Suite: uint16(pqc.MLKEM1024P384), Agreement: n.root.PublicKey().Bytes(),
		SigningSuite: uint16(pqc.ECDSAP384SHA384), Signing: must(n.dev.SigningKey().Bytes()),
		Device: "the next one", ImportKind: kind, Import: public,
	}
	return n
}

// parameters are those of a proposal that the root be the node's next.
func (n nextRoot) parameters(w *world, node string, leave bool) wire.ProposalParameters {
	w.t.Helper()
	st := w.cluster.State()
	m := approval.RootMessage(st.Cluster(), node, st.NextRoot(node), n.rec)
	sig := check[[]byte](w.t)(n.dev.Sign(bg, must(pqc.Digest(pqc.ECDSAP384SHA384, m, []byte(approval.RootContext)))))
	r := rootView(n.rec)
	return wire.ProposalParameters{Node: &wire.NextRoot{Root: r, Possession: sig, Leave: leave}}
}

func (n nextRoot) adoption(w *world, node string, progress func(AdoptionProgress)) *Adoption {
	return must(NewAdoption(AdoptionConfig{
		Node: node, Cluster: nodeCluster{w.cluster, w.nodes[node]}, Watch: w.cluster, Root: n.root, Signer: n.dev,
		SigningSuite: pqc.ECDSAP384SHA384, Now: w.clock.Now, After: w.clock.After, Progress: progress,
	}))
}

// restart starts the node anew on its next device.
func (n nextRoot) restart(w *world, node string) {
	w.t.Helper()
	tn := w.nodes[node]
	tn.cache.Purge()
	tn.dev = n.dev
	tn.cache = must(keyring.NewCache(n.root, keyring.Limits{TTL: time.Hour, MaxKEKs: 100, MaxKeys: 1000}))
	w.t.Cleanup(tn.cache.Purge)
	cfg := w.config(tn, n.root)
	cfg.SigningSuite = pqc.ECDSAP384SHA384
	tn.engine = must(New(cfg))
}

func (w *world) node(id string) wire.Node {
	w.t.Helper()
	l := check[wire.Nodes](w.t)(w.at("fr").engine.Nodes(bg, caller("operator", "fr")))
	for _, n := range l.Nodes {
		if n.ID == id {
			return n
		}
	}
	w.t.Fatalf("no node %s", id)
	return wire.Node{}
}

// The whole story: approval, resealing by the others, adoption, and work on the
// new device, while the old one is dead.
func TestRootReplacement(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("soft", "fr", "de", "jp")
	w.key("soft", "data", kms.Encrypt)
	w.hardware("hard", "fr", "de")
	w.threeKeys("hard")
	as := w.agents()
	w.carry(as, kms.ActionRotate, approval.KeyTarget("hard", "encrypt"), wire.ProposalParameters{})
	fr, svc := w.at("fr").engine, caller("service", "fr")
	softCT := check[wire.EncryptResponse](t)(fr.Encrypt(bg, svc, "soft", "data", wire.EncryptRequest{Plaintext: []byte("soft")}))
	hardCT := check[wire.EncryptResponse](t)(fr.Encrypt(bg, svc, "hard", "encrypt", wire.EncryptRequest{Plaintext: []byte("hard")}))

	next := newNextRoot(t)
	var steps []AdoptionProgress
	a := next.adoption(w, "de-1", func(p AdoptionProgress) { steps = append(steps, p) })
	if done, err := a.step(bg); done || err != nil {
		t.Fatalf("before the proposal: %v, %v", done, err)
	}
	w.at("de").dev.Fail(func(string) error { return errors.New("dead") })
	delete(as, "de-1")
	p := check[wire.Proposal](t)(fr.OpenProposal(bg, caller("operator", "fr"), wire.OpenProposalRequest{
		Action: "node", Target: "node/de-1", Parameters: next.parameters(w, "de-1", false), Reason: "the old one is dead"}))
	if n := p.Content.Parameters.Node; n == nil || n.Root.Device != "the next one" || n.Root.SuiteName == "" || len(n.Possession) == 0 {
		t.Fatalf("shown as %+v", p.Content.Parameters)
	}
	w.vote(p, approval.Approve, "fr-a", "de-a")
	w.settle(as)
	w.clock.Advance(2 * time.Second)
	w.settle(as)
	w.clock.Advance(2 * time.Second)
	w.settle(as)
	if r := w.node("de-1").Replacing; r == nil || r.Root != 2 || r.Missing != 0 || r.Sealed != 5 || r.Proposal != p.ID {
		t.Fatalf("replacing %+v", r)
	}
	if done, err := a.step(bg); !done || err != nil {
		t.Fatalf("adoption: %v, %v", done, err)
	}
	if last := steps[len(steps)-1]; last.Root != 2 || last.Opened != 5 || last.Missing != 0 {
		t.Errorf("progress %+v", steps)
	}
	n := w.node("de-1")
	if n.Root != 2 || n.Replacing != nil || n.Device != "the next one" {
		t.Errorf("node %+v", n)
	}

	// The old process has nothing to open any more, and says why.
	de, sde := w.at("de"), caller("service", "de")
	de.dev.Fail(nil)
	de.cache.Purge()
	_, err := de.engine.Decrypt(bg, sde, "hard", "encrypt", wire.DecryptRequest{Ciphertext: hardCT.Ciphertext})
	if wantKind(t, err, kms.Unavailable); !strings.Contains(err.Error(), "hardware root") {
		t.Errorf("%q", err)
	}
	next.restart(w, "de-1")
	for want, x := range map[string]struct {
		ring, key string
		ct        []byte
	}{"soft": {"soft", "data", softCT.Ciphertext}, "hard": {"hard", "encrypt", hardCT.Ciphertext}} {
		d := check[wire.DecryptResponse](t)(de.engine.Decrypt(bg, sde, x.ring, x.key, wire.DecryptRequest{Ciphertext: x.ct}))
		if string(d.Plaintext) != want {
			t.Errorf("%s: %d bytes", want, len(d.Plaintext))
		}
	}
	w.useHardware("hard", "de", "fr")
	as = w.agents()
	w.carry(as, kms.ActionRotate, approval.KeyTarget("hard", "sign"), wire.ProposalParameters{})
	if k, _ := w.cluster.State().Key("hard", "sign"); k.Primary != 2 {
		t.Errorf("rotation after the replacement: primary %d", k.Primary)
	}
	if err := a.Run(bg); err != nil {
		t.Errorf("run again: %v", err)
	}
}

// Run does it by itself, beside agents that run by themselves.
func TestAdoptionRuns(t *testing.T) {
	w := newWorld(t, "")
	w.hardware("hard", "fr", "de")
	w.key("hard", "data", kms.Encrypt)
	w.keyring("soft", "de", "fr")
	next := newNextRoot(t)
	failed := make(chan struct{}, 1)
	next.dev.Fail(func(op string) error { // once
		if op == fakedevice.OpECDH {
			select {
			case failed <- struct{}{}:
				return errors.New("not yet")
			default:
			}
		}
		return nil
	})
	done := make(chan error, 1)
	a := next.adoption(w, "de-1", nil)
	w.run(w.agents())
	go func() { done <- a.Run(bg) }()
	p := w.propose(kms.ActionNode, "node/de-1", next.parameters(w, "de-1", false))
	w.vote(p, approval.Approve, "fr-a", "de-a")
	w.await("adoption", func(st *state.State) bool { n, _ := st.Node("de-1"); return n.Root == 2 })
	if err := <-done; err != nil {
		t.Errorf("run: %v", err)
	}
	if len(failed) != 1 {
		t.Error("the device did not fail")
	}
	ctx, cancel := context.WithCancel(bg)
	cancel()
	err := newNextRoot(t).adoption(w, "de-1", nil).Run(ctx)
	wantKind(t, err, kms.Unavailable)
}

// Without another device of its kind keys of protection hardware stay behind, if
// the custodians let them.
func TestKeysThatCannotMove(t *testing.T) {
	w := mixedWorld(t)
	w.hardware("all", "fr", "de", "jp")
	w.key("all", "data", kms.Encrypt)
	w.keyring("soft", "jp", "fr")
	as := w.agents()
	settle := func() {
		for range 3 {
			w.settle(as)
			w.clock.Advance(2 * time.Second)
		}
	}
	next := newNextRoot(t)
	next.rec.ImportKind = otherKind
	a := next.adoption(w, "jp-1", nil)
	p := w.propose(kms.ActionNode, "node/jp-1", next.parameters(w, "jp-1", false))
	w.vote(p, approval.Approve, "fr-a", "jp-a")
	settle()
	if r := w.node("jp-1").Replacing; r == nil || r.Missing != 1 || r.Sealed != 1 || !strings.Contains(r.Note, "cannot be moved") {
		t.Fatalf("replacing %+v", r)
	}
	if done, err := a.step(bg); done || err != nil {
		t.Fatalf("adopted without a key: %v, %v", done, err)
	}
	p = w.propose(kms.ActionNode, "node/jp-1", next.parameters(w, "jp-1", true))
	w.vote(p, approval.Approve, "fr-a", "jp-a")
	settle()
	if done, err := a.step(bg); !done || err != nil {
		t.Fatalf("with leave: %v, %v", done, err)
	}
	next.restart(w, "jp-1")
	_, err := w.at("jp").engine.Encrypt(bg, caller("service", "jp"), "all", "data", wire.EncryptRequest{})
	if wantKind(t, err, kms.NotResident); !strings.Contains(err.Error(), "rotate") {
		t.Errorf("%q", err)
	}
	w.carry(w.agents(), kms.ActionRotate, approval.KeyTarget("all", "data"), wire.ProposalParameters{})
	check[wire.EncryptResponse](t)(w.at("jp").engine.Encrypt(bg, caller("service", "jp"), "all", "data", wire.EncryptRequest{}))
}

// A device that cannot wrap for another one is said once, and not asked again.
func TestDeviceCannotRewrap(t *testing.T) {
	w := newWorld(t, "")
	w.hardware("hard", "fr", "de")
	w.key("hard", "data", kms.Encrypt)
	as := w.agents()
	w.at("fr").dev.Fail(func(op string) error {
		if op == fakedevice.OpRewrap {
			return cannotDo{errors.New("no such mechanism")}
		}
		return nil
	})
	next := newNextRoot(t)
	p := w.propose(kms.ActionNode, "node/de-1", next.parameters(w, "de-1", false))
	w.vote(p, approval.Approve, "fr-a", "de-a")
	for range 5 {
		w.settle(as)
		w.clock.Advance(MaxBackoff)
	}
	if n := w.at("fr").dev.Calls(fakedevice.OpRewrap); n != 1 {
		t.Errorf("asked %d times", n)
	}
	if r := w.node("de-1").Replacing; r == nil || r.Missing != 1 {
		t.Errorf("replacing %+v", r)
	}
	// Custodians let the key be left behind: it is, but not before others had time.
	p = w.propose(kms.ActionNode, "node/de-1", next.parameters(w, "de-1", true))
	w.vote(p, approval.Approve, "fr-a", "de-a")
	for range siteIDs {
		w.settle(as)
		w.clock.Advance(2 * time.Second)
	}
	a := next.adoption(w, "de-1", nil)
	if done, err := a.step(bg); done || err != nil {
		t.Fatalf("left at once: %v, %v", done, err)
	}
	w.clock.Advance(leaveAfter * time.Millisecond)
	w.tick()
	if done, err := a.step(bg); !done || err != nil {
		t.Errorf("not left in the end: %v, %v", done, err)
	}
}

// cannotDo is what a device says of what it cannot do at all.
type cannotDo struct{ error }

func (cannotDo) Unsupported() bool { return true }

func TestNewAdoptionRefuses(t *testing.T) {
	w := newWorld(t, "")
	next := newNextRoot(t)
	good := next.adoption(w, "de-1", nil).cfg
	for what, change := range map[string]func(*AdoptionConfig){
		"node": func(c *AdoptionConfig) { c.Node = "" }, "cluster": func(c *AdoptionConfig) { c.Cluster = nil },
		"watch": func(c *AdoptionConfig) { c.Watch = nil }, "root": func(c *AdoptionConfig) { c.Root = nil },
		"signer": func(c *AdoptionConfig) { c.Signer = nil }, "suite": func(c *AdoptionConfig) { c.SigningSuite = 0 },
	} {
		c := good
		change(&c)
		if _, err := NewAdoption(c); kms.KindOf(err) != kms.Invalid {
			t.Errorf("no %s: %v", what, err)
		}
	}
}
