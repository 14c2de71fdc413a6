package state_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// What a new cluster needs is asked of whoever founds one; a document of before, which has
// it not, stays valid.
func TestCheckFounding(t *testing.T) {
	votes := func(g *state.Genesis, sites ...string) {
		for i, n := range g.Nodes {
			g.Nodes[i].Voter = slices.Contains(sites, n.Site)
		}
	}
	without := func(g *state.Genesis, a kms.Action) {
		g.Policies[0].Rules = slices.DeleteFunc(slices.Clone(g.Policies[0].Rules), func(r approval.Rule) bool { return r.Action == a })
	}
	recover := func(g *state.Genesis, change func(*approval.Rule)) {
		rules := slices.Clone(g.Policies[0].Rules)
		change(&rules[slices.IndexFunc(rules, func(r approval.Rule) bool { return r.Action == kms.ActionRecover })])
		g.Policies[0].Rules = rules
	}
	for name, x := range map[string]struct {
		change func(*state.Genesis)
		says   string // "" for a good one
	}{
		"one of three each":         {func(*state.Genesis) {}, ""},
		"two sites with one each":   {func(g *state.Genesis) { votes(g, "de", "fr") }, ""},
		"one voter":                 {func(g *state.Genesis) { votes(g, "fr") }, "site fr has 1 of 1 voters, a majority (more than 0)"},
		"as they want it":           {func(g *state.Genesis) { votes(g, "fr"); g.MajoritySite = "fr" }, ""},
		"another than they want":    {func(g *state.Genesis) { votes(g, "fr"); g.MajoritySite = "de" }, "site fr has 1 of 1 voters"},
		"not what they say":         {func(g *state.Genesis) { g.MajoritySite = "fr" }, "which it has not (1 of 3)"},
		"no rule for recover":       {func(g *state.Genesis) { without(g, kms.ActionRecover) }, "could never be brought back"},
		"one approval for recover":  {func(g *state.Genesis) { recover(g, func(r *approval.Rule) { r.Approvals, r.Sites = 1, 1 }) }, ""},
		"no custodians for recover": {func(g *state.Genesis) { g.Custodians = g.Custodians[:1] }, "could never be recovered"},
	} {
		w := statetest.New(t, statetest.Options{})
		var g state.Genesis
		if err := canon.Unmarshal(w.Genesis().Marshal(), &g); err != nil {
			t.Fatal(err)
		}
		x.change(&g)
		err := g.CheckFounding()
		if x.says == "" && err != nil || x.says != "" && (kms.KindOf(err) != kms.Invalid || !strings.Contains(err.Error(), x.says)) {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := state.ParseGenesis(g.Marshal()); err != nil && name != "no custodians for recover" {
			t.Errorf("%s: the document is not valid any more: %v", name, err)
		}
	}
	alone := statetest.New(t, statetest.Options{Sites: []string{"fr"}}).Genesis()
	if err := alone.CheckFounding(); kms.KindOf(err) != kms.Invalid {
		t.Errorf("one site that does not say so: %v", err)
	}
	alone.MajoritySite = "fr"
	if err := alone.CheckFounding(); err != nil {
		t.Errorf("one site that says so: %v", err)
	}
}

// A cluster that can be recovered stays one.
func TestRecoverRuleStays(t *testing.T) {
	w := statetest.New(t, statetest.Options{})
	rules := slices.DeleteFunc(slices.Clone(statetest.Policies(3)[0].Rules), func(r approval.Rule) bool { return r.Action == kms.ActionRecover })
	p := w.Proposal(kms.ActionPolicy, "policy/governance", approval.PolicyParams{Rules: rules})
	open := func() []byte {
		return w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	}
	if _, r := w.State().Apply(w.State().Index()+1, open()); r.Err() != nil {
		t.Errorf("nodes of a release that would take it are among them: %v", r.Err())
	}
	w.Announce()
	refused(t, w, kms.Invalid, open())
	w.Carry(kms.ActionPolicy, "policy/governance", approval.PolicyParams{Rules: statetest.Policies(3)[0].Rules})
}
