package state_test

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

const de = "node-de-1"

// attested is a cluster whose nodes fr and de have attested hardware, with a policy
// that asks for it.
func attested(t testing.TB) *statetest.World {
	policies := statetest.Policies(3)
	strict := policies[1]
	strict.Name, strict.Attested = "strict", true
	return statetest.New(t, statetest.Options{Policies: append(policies, strict), Attested: map[string]string{fr: de, de: "node-jp-1"}})
}

func TestAttestedGenesis(t *testing.T) {
	w := attested(t)
	s := w.State()
	for node, want := range map[string]bool{fr: true, de: true, "node-jp-1": false, "none": false} {
		if r := s.Attestation(node); r.Attested != want || node == fr && (r.Kind != "tpm2" || len(r.Proven) < 4) {
			t.Errorf("%s: %+v", node, r)
		}
	}
	for name, change := range map[string]func(*state.Genesis){
		"no vendor's certificate": func(g *state.Genesis) { g.Vendors = [][]byte{{1, 2}} },
		"too many vendors":        func(g *state.Genesis) { g.Vendors = make([][]byte, state.MaxVendors+1) },
		"a long certificate":      func(g *state.Genesis) { g.Vendors = [][]byte{make([]byte, state.MaxCertificate+1)} },
		"another node's document": func(g *state.Genesis) { g.Nodes[0].Attestation = g.Nodes[1].Attestation },
		"a changed document":      func(g *state.Genesis) { g.Nodes[1].Attestation[700] ^= 1 },
		"garbage":                 func(g *state.Genesis) { g.Nodes[2].Attestation = []byte("attested") },
		"another witness key": func(g *state.Genesis) {
			g.Nodes[2].Signing = w.NewRoot("node-jp-1").Record.Signing
		},
	} {
		g, err := state.ParseGenesis(w.Signed().Genesis)
		if err != nil {
			t.Fatal(err)
		}
		change(&g)
		if _, err := state.ParseGenesis(g.Marshal()); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
	// Without the vendor the document holds and proves less.
	g, err := state.ParseGenesis(w.Signed().Genesis)
	if err != nil {
		t.Fatal(err)
	}
	g.Vendors = nil
	other, err := state.New(w.SignGenesis(g))
	if err != nil {
		t.Fatal(err)
	}
	if other.Attestation(fr).Attested {
		t.Error("attested without a vendor")
	}
}

func TestAttestedPolicy(t *testing.T) {
	w := attested(t)
	op := statetest.As(w.Operator("fr"))
	ring := func(sites ...string) state.CreateKeyring {
		c := w.KeyringCommand("secret", sites...)
		c.Policy = "strict"
		return c
	}
	r := w.Apply(w.Command(fr, ring("fr", "de", "jp"), op))
	if r.Kind != kms.Conflict || !strings.Contains(r.Message, "node-jp-1") || strings.Contains(r.Message, fr) {
		t.Errorf("%v %s", r.Kind, r.Message)
	}
	w.Do(fr, ring("fr", "de"), op)
	w.CreateKeyring("wide", "fr", "de", "jp") // under another policy
	// A policy is not made to ask for what its keyrings do not have.
	rules := statetest.Policies(3)[1].Rules
	p := w.Proposal(kms.ActionPolicy, "policy/standard", approval.PolicyParams{Rules: rules, Attested: true})
	refused(t, w, kms.Conflict, w.Command(fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer)))
	// To ask no more takes what the strictest rule takes: three sites.
	id := w.Propose(kms.ActionPolicy, "policy/strict", approval.PolicyParams{Rules: rules})
	w.Approve(id, "fr-1", "de-1", "de-2", "fr-2")
	progress(t, w, id, "open")
	w.Approve(id, "jp-1")
	w.Execute(id)
	if p, _ := w.State().Policy("strict"); p.Attested || p.Revision != 2 {
		t.Errorf("policy %+v", p)
	}
	w.Carry(kms.ActionPolicy, "policy/strict", approval.PolicyParams{Rules: rules, Attested: true})
	if p, _ := w.State().Policy("strict"); !p.Attested {
		t.Error("the policy does not ask again")
	}
	restoreBoth(t, w.State())
}

func TestAttestedRoots(t *testing.T) {
	w := attested(t)
	c := w.KeyringCommand("secret", "fr", "de")
	c.Policy = "strict"
	w.Do(fr, c, statetest.As(w.Operator("fr")))
	open := func(n *statetest.Node) []byte {
		p := w.Proposal(kms.ActionNode, approval.NodeTarget(fr), w.NodeParams(fr, n, false))
		return w.Command(fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	}
	refused(t, w, kms.Conflict, open(w.NewRoot(fr))) // no document
	n := w.NewRoot(fr)
	w.Attest(n, "")
	refused(t, w, kms.Conflict, open(n)) // no witness
	w.Attest(n, "node-jp-1")
	n.Record.Attestation[900] ^= 1
	if r := w.Apply(open(n)); r.Kind != kms.BadSignature && r.Kind != kms.Invalid {
		t.Errorf("a changed document: %v %s", r.Kind, r.Message)
	}
	// The witness changes its own root between the proposal and the adoption.
	w.Attest(n, de)
	w.Carry(kms.ActionNode, approval.NodeTarget(fr), w.NodeParams(fr, n, false))
	next := w.NewRoot(de)
	w.Attest(next, "node-jp-1")
	w.Carry(kms.ActionNode, approval.NodeTarget(de), w.NodeParams(de, next, false))
	w.Reseal(de)
	w.Do(de, w.AdoptCommand(de))
	w.Reseal(fr)
	if err := w.State().VerifyStatements(); err != nil {
		t.Error(err)
	}
	w.Do(fr, w.AdoptCommand(fr))
	// The certificates expire; what was proven was proven.
	w.Advance(400 * 24 * time.Hour)
	for _, node := range []string{fr, de} {
		if r := w.State().Attestation(node); !r.Attested {
			t.Errorf("%s: %+v", node, r)
		}
	}
	restoreBoth(t, w.State())
	got, err := state.Restore(bytes.NewReader(snapshot(t, w.State())), nil)
	if err != nil || !got.Attestation(fr).Attested {
		t.Errorf("restored: %+v %v", got.Attestation(fr), err)
	}
	late := w.NewRoot(fr)
	w.Attest(late, "node-jp-1")
	refused(t, w, kms.Conflict, open(late)) // its certificate has expired
}

// TestAdoptionMeetsNewKeyrings: a keyring that comes while a root is pending can
// ask for what that root has not.
func TestAdoptionMeetsNewKeyrings(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*statetest.World, *statetest.Node)
		ring   func(*statetest.World) state.CreateKeyring
	}{
		"attested": {func(w *statetest.World, n *statetest.Node) { w.Attest(n, "") }, func(w *statetest.World) state.CreateKeyring {
			c := w.KeyringCommand("secret", "fr", "de")
			c.Policy = "strict"
			return c
		}},
		"hardware": {func(_ *statetest.World, n *statetest.Node) { n.Record.ImportKind, n.Record.Import = "", nil }, func(w *statetest.World) state.CreateKeyring {
			return w.HardwareKeyringCommand("vault", "fr", "de")
		}},
	} {
		t.Run(name, func(t *testing.T) {
			w := attested(t)
			n := w.NewRoot(fr)
			c.change(w, n)
			w.Carry(kms.ActionNode, approval.NodeTarget(fr), w.NodeParams(fr, n, false))
			w.Do(de, c.ring(w), statetest.As(w.Operator("de")))
			w.Reseal(fr)
			refused(t, w, kms.Conflict, w.Command(fr, w.AdoptCommand(fr)))
			restoreBoth(t, w.State())
		})
	}
}
