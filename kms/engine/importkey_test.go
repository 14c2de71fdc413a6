package engine

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

// owner is somebody with a key of their own.
type owner struct {
	material []byte
	params   wire.ImportedKey
	request  wire.ImportKeyRequest
}

// owned seals a new key to a node.
func (w *world) owned(ring, name, site string, p kms.Purpose) *owner {
	w.t.Helper()
	o := &owner{material: make([]byte, 32), params: wire.ImportedKey{Node: site + "-1", Purpose: string(p), Algorithm: string(p.Algorithms()[0])}}
	_, _ = rand.Read(o.material)
	if p == kms.Sign {
		s := must(secret.Copy(o.material))
		defer s.Destroy()
		o.params.PublicKey = check[[]byte](w.t)(keyring.CheckImport(p.Algorithms()[0], s))
	}
	w.seal(o, ring, name, o.material)
	return o
}

func (w *world) seal(o *owner, ring, name string, material []byte) {
	w.t.Helper()
	n, _ := w.cluster.State().Node(o.params.Node)
	info, aad := approval.ImportBinding(w.cluster.State().Cluster(), ring, name, n.ID, kms.Purpose(o.params.Purpose), kms.Algorithm(o.params.Algorithm))
	o.request.Sealed = check[[]byte](w.t)(check[*pqc.PublicKey](w.t)(pqc.ParsePublicKey(pqc.SuiteID(n.Suite), n.Agreement)).Seal(info, aad, material))
	sum := sha256.Sum256(o.request.Sealed)
	o.params.Sealed = sum[:]
}

// approved opens the proposal to import and approves it.
func (w *world) approved(o *owner, ring, name string) {
	w.t.Helper()
	p := w.propose(kms.ActionImport, approval.KeyTarget(ring, name), wire.ProposalParameters{Import: &o.params})
	w.vote(p, approval.Approve, "fr-a", "de-a")
	o.request.Proposal = p.ID
}

// allow gives the keyrings' policy a rule for a later action: two custodians of two sites.
func (w *world) allow(a kms.Action) {
	w.t.Helper()
	as := w.agents()
	w.settle(as) // every node announces what it knows
	rules := []wire.Rule{}
	for _, r := range testPolicies()[1].Rules {
		rules = append(rules, ruleView(r))
	}
	rules = append(rules, wire.Rule{Action: string(a), Approvals: 2, Sites: 2, LifetimeMS: 86_400_000})
	p := w.propose(kms.ActionPolicy, "policy/standard", wire.ProposalParameters{Rules: rules})
	w.vote(p, approval.Approve, "fr-a", "de-a", "jp-a")
	w.settle(as)
	for range siteIDs { // every rank's turn
		w.clock.Advance(2 * time.Second)
		w.settle(as)
	}
}

// TestImport: the owner's key does at every resident node what it does at home, at both
// protection levels.
func TestImport(t *testing.T) {
	w := mixedWorld(t)
	w.allow(kms.ActionImport)
	w.keyring("soft", "fr", "jp")
	w.hardware("hard", "fr", "jp")
	for _, ring := range []string{"soft", "hard"} {
		for _, p := range []kms.Purpose{kms.Encrypt, kms.MAC, kms.Sign} {
			o := w.owned(ring, string(p), "jp", p)
			w.approved(o, ring, string(p))
			k := check[wire.Key](t)(w.at("jp").engine.ImportKey(bg, caller("operator", "jp"), ring, string(p), o.request))
			if v := k.Versions[0]; v.Generated != "imported" || v.Proposal != o.request.Proposal || v.State != "active" || !bytes.Equal(v.PublicKey, o.params.PublicKey) {
				t.Errorf("%s/%s: %+v", ring, p, v)
			}
			if l := w.at("jp").log.last(); l.Action != "key:import" || l.Resource != kms.KeyPath(ring, string(p)) || l.Outcome != "ok" {
				t.Errorf("the access log has %+v", l)
			}
			again := check[wire.Key](t)(w.at("de").engine.ImportKey(bg, caller("operator", "de"), ring, string(p), o.request))
			if again.ID != k.ID {
				t.Error("a repetition made another key")
			}
			w.settle(w.agents())
			w.atHome(o, ring, string(p))
		}
		w.useHardware(ring, "fr", "jp")
	}
}

// atHome compares what a node does with a key with what its owner does.
func (w *world) atHome(o *owner, ring, name string) {
	w.t.Helper()
	b := keyring.KeyBinding{Cluster: "home", Keyring: "home", KEK: 1, KeyID: kms.KeyID{1}, Version: 1, Algorithm: kms.Algorithm(o.params.Algorithm), Purpose: kms.Purpose(o.params.Purpose)}
	m := check[*keyring.Material](w.t)(keyring.NewMaterial(b, must(secret.Copy(o.material))))
	defer m.Destroy()
	fr, who := w.at("fr").engine, caller("service", "fr")
	switch b.Purpose {
	case kms.MAC:
		r := check[wire.MACResponse](w.t)(fr.MAC(bg, who, ring, name, wire.MACRequest{Message: []byte("m")}))
		if err := m.VerifyMAC(bg, []byte("m"), r.MAC); err != nil {
			w.t.Error(err)
		}
	case kms.Sign:
		r := check[wire.SignResponse](w.t)(fr.Sign(bg, who, ring, name, wire.SignRequest{Message: []byte("m")}))
		if err := keyring.Verify(b.Algorithm, m.PublicKey(), []byte("m"), r.Signature); err != nil {
			w.t.Error(err)
		}
	}
}

// TestImportIsRefused: nothing is opened before the quorum has approved, and nothing but
// what it has approved.
func TestImportIsRefused(t *testing.T) {
	w := newWorld(t, "")
	w.allow(kms.ActionImport)
	w.keyring("r", "fr", "de")
	o := w.owned("r", "mine", "fr", kms.Sign)
	p := w.propose(kms.ActionImport, "key/r/mine", wire.ProposalParameters{Import: &o.params})
	o.request.Proposal = p.ID
	hand := func(site, role, name string, change func(*wire.ImportKeyRequest)) error {
		q := o.request
		change(&q)
		_, err := w.at(site).engine.ImportKey(bg, caller(role, site), "r", name, q)
		if err != nil && strings.Contains(err.Error(), string(o.material[:4])) {
			t.Error("the error shows the material")
		}
		return err
	}
	same := func(*wire.ImportKeyRequest) {}
	wantKind(t, hand("fr", "operator", "mine", same), kms.NeedsApproval)
	w.settle(w.agents())
	w.vote(p, approval.Approve, "fr-a", "de-a")
	w.settle(w.agents()) // none of them carries it out
	wantKind(t, hand("fr", "service", "mine", same), kms.Denied)
	wantKind(t, hand("de", "operator", "mine", same), kms.NotResident)
	wantKind(t, hand("fr", "operator", "other", same), kms.Invalid)
	wantKind(t, hand("fr", "operator", "mine", func(q *wire.ImportKeyRequest) { q.Proposal = strings.Repeat("0", 32) }), kms.NotFound)
	wantKind(t, hand("fr", "operator", "mine", func(q *wire.ImportKeyRequest) { q.Sealed = q.Sealed[1:] }), kms.Invalid)
	if w.at("fr").log.last().Outcome != kms.Invalid.String() {
		t.Errorf("the access log has %+v", w.at("fr").log.last())
	}
	if err := hand("fr", "operator", "mine", same); err != nil {
		t.Fatal(err)
	}
	_, err := w.at("de").engine.OpenProposal(bg, caller("operator", "de"), wire.OpenProposalRequest{
		Action: "import", Target: "key/r/mine", Parameters: wire.ProposalParameters{Import: &o.params}, Reason: "again"})
	wantKind(t, err, kms.Exists)
	_, err = w.at("de").engine.OpenProposal(bg, caller("operator", "de"), wire.OpenProposalRequest{Action: "import", Target: "key/r/more", Reason: "nothing"})
	wantKind(t, err, kms.Invalid)

	for name, c := range map[string]struct {
		material []byte
		bound    string // key that the material is sealed for
		kind     kms.Kind
	}{
		"weak":      {bytes.Repeat([]byte{1, 2}, 16), "weak", kms.Invalid},
		"short":     {o.material[:31], "short", kms.Invalid},
		"other":     {append([]byte{o.material[0] ^ 1}, o.material[1:]...), "other", kms.Invalid}, // another public key
		"elsewhere": {o.material, "mine", kms.OpenFailed},
	} {
		bad := *o
		w.seal(&bad, "r", c.bound, c.material)
		w.approved(&bad, "r", name)
		_, err := w.at("fr").engine.ImportKey(bg, caller("operator", "fr"), "r", name, bad.request)
		wantKind(t, err, c.kind)
		if _, ok := w.cluster.State().Key("r", name); ok {
			t.Errorf("%s: the key was made", name)
		}
	}
}
