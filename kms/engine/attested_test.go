package engine

import (
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/wire"
)

// policy proposes rules for the policy strict, and lets three custodians approve.
func (w *world) policy(as map[string]*Agent, attested *bool) wire.Proposal {
	w.t.Helper()
	var rules []wire.Rule
	for _, r := range testPolicies()[1].Rules {
		rules = append(rules, ruleView(r))
	}
	p := w.propose(kms.ActionPolicy, "policy/strict", wire.ProposalParameters{Rules: rules, Attested: attested})
	w.vote(p, approval.Approve, "fr-a", "de-a", "jp-a")
	for range siteIDs {
		w.settle(as)
		w.clock.Advance(2 * time.Second)
	}
	return p
}

// A policy can ask for attested hardware; a change that does not speak of it leaves
// it so.
func TestAttestedPolicy(t *testing.T) {
	w := newWorld(t, "")
	as := w.agents()
	yes, no := true, false
	for _, c := range []struct {
		ask  *bool
		want bool
	}{{nil, false}, {&yes, true}, {nil, true}, {&no, false}, {&yes, true}} {
		p := w.policy(as, c.ask)
		if a := p.Content.Parameters.Attested; a == nil || *a != c.want {
			t.Fatalf("the proposal shows %v, want %v", a, c.want)
		}
		l := check[wire.Policies](t)(w.at("fr").engine.Policies(bg, caller("auditor", "fr")))
		v := l.Policies[len(l.Policies)-1]
		if v.Name != "strict" || v.Attested != c.want || strings.Contains(strings.Join(v.Summary, "\n"), "attested") != c.want {
			t.Fatalf("policy %s: attested %v, want %v", v.Name, v.Attested, c.want)
		}
	}
	for _, protection := range []string{"software", "hardware"} {
		_, err := w.at("fr").engine.CreateKeyring(bg, caller("operator", "fr"), wire.CreateKeyringRequest{
			Name: "r", Residency: []string{"fr", "de"}, Policy: "strict", Protection: protection})
		if wantKind(t, err, kms.Conflict); !strings.Contains(err.Error(), "fr-1") || !strings.Contains(err.Error(), "de-1") {
			t.Errorf("%q does not name the nodes", err)
		}
	}
	_, err := w.at("fr").engine.OpenProposal(bg, caller("operator", "fr"), wire.OpenProposalRequest{
		Action: "rotate", Target: "key/r/data", Reason: "x", Parameters: wire.ProposalParameters{Attested: &no}})
	wantKind(t, err, kms.NotFound)
	w.keyring("plain", "fr")
	w.key("plain", "data", kms.Encrypt)
	for what, q := range map[string]wire.ProposalParameters{"attested": {Attested: &no}, "node": {Node: &wire.NextRoot{}}} {
		_, err := w.at("fr").engine.OpenProposal(bg, caller("operator", "fr"), wire.OpenProposalRequest{
			Action: "rotate", Target: "key/plain/data", Reason: "x", Parameters: q})
		if kms.KindOf(err) != kms.Invalid {
			t.Errorf("a rotation with %s: %v", what, err)
		}
	}
}

func TestNodeProposalRefuses(t *testing.T) {
	w := newWorld(t, "")
	next := newNextRoot(t)
	good := next.parameters(w, "de-1", false)
	forged := *good.Node
	forged.Possession = append([]byte{}, forged.Possession...)
	forged.Possession[3] ^= 1
	other := *good.Node
	other.Root.Device = "something else"
	for what, c := range map[string]struct {
		target string
		node   *wire.NextRoot
		kind   kms.Kind
	}{
		"nothing":                  {"node/de-1", nil, kms.Invalid},
		"an unknown node":          {"node/us-1", good.Node, kms.NotFound},
		"no keys":                  {"node/de-1", &wire.NextRoot{}, kms.Invalid},
		"a forged possession":      {"node/de-1", &forged, kms.BadSignature},
		"another root's":           {"node/de-1", &other, kms.BadSignature},
		"another node's":           {"node/fr-1", good.Node, kms.BadSignature},
		"a target of another kind": {"policy/standard", good.Node, kms.Invalid},
	} {
		_, err := w.at("fr").engine.OpenProposal(bg, caller("operator", "fr"), wire.OpenProposalRequest{
			Action: "node", Target: c.target, Reason: "x", Parameters: wire.ProposalParameters{Node: c.node}})
		if kms.KindOf(err) != c.kind {
			t.Errorf("%s: %v (%v), want %v", what, err, kms.KindOf(err), c.kind)
		}
	}
}
