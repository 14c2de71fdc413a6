package state_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// custodiansAt returns n custodians of each site with two credentials each.
func custodiansAt(n int, sites ...string) (all []approval.Custodian) {
	for _, s := range sites {
		for i := range n {
			all = append(all, approval.Custodian{ID: fmt.Sprintf("%s-%d", s, i+1), Site: s, Credentials: make([]approval.Credential, 2)})
		}
	}
	return all
}

// problems returns the problems of every case, one to a line.
func problems(policies []approval.Policy, cs []approval.Custodian, sites []string) string {
	var all []string
	for _, c := range state.Cases(policies, cs, sites) {
		all = append(all, c.Problems(approval.Simulate(c.Rule, cs, "spiffe://fr.example/operator/anna"))...)
	}
	return strings.Join(all, "\n")
}

// TestCasesAskForWhatRuleForAsks: each case has the rule that the state decides by.
func TestCasesAskForWhatRuleForAsks(t *testing.T) {
	sites := []string{"de", "fr", "jp"}
	policies, cs := statetest.Policies(3), custodiansAt(2, sites...)
	got := map[string]approval.Rule{}
	for _, c := range state.Cases(policies, cs, sites) {
		if c.Err != nil {
			t.Errorf("%s %s: %v", c.Action, c.About, c.Err)
		}
		got[string(c.Action)+"/"+c.About] = c.Rule
	}
	for name, want := range map[string]string{
		"rotate/": "2 2 []", "destroy/": "3 3 []", "custodian/one of fr": "3 3 [fr]", "custodian/revoke": "2 2 []",
		"node/one of jp": "2 2 [jp]", "node/remove": "2 2 []", "site/CAs of de": "2 2 [de]", "site/add or remove": "2 2 []",
		"policy/every rule of standard": "3 3 []", "policy/every rule of governance": "2 2 []", "policy/a new policy": "2 2 []",
		"recovery-key/keyrings of de": "2 2 [de]", "recover/": "2 2 []", "create/": "0 0 []",
	} {
		r, ok := got[name]
		if s := fmt.Sprint(r.Approvals, r.Sites, r.Required); !ok || s != want {
			t.Errorf("%s: %s, want %s (%v)", name, s, want, ok)
		}
	}
	// The two functions agree where a proposal can be made.
	w := statetest.New(t, statetest.Options{})
	p := w.Proposal(kms.ActionCustodian, "custodian/fr-9", approval.CustodianParams{Custodian: statetest.Record("fr-9", "fr", 0, w.AddCustodianKey("fr-9"))})
	r, err := w.State().Rule(p)
	if c := got["custodian/one of fr"]; err != nil || r.Approvals != c.Approvals || r.Sites != c.Sites || !slices.Equal(r.Required, c.Required) {
		t.Errorf("%+v, %+v, %v", r, c, err)
	}
}

func TestProblems(t *testing.T) {
	sites := []string{"de", "fr", "jp"}
	if got := problems(statetest.Policies(2), custodiansAt(2, sites...), sites); got != "" {
		t.Errorf("two of three sites, two custodians each:\n%s", got)
	}
	// One nation alone: any of them, one that the rule names, and where that is meant.
	alone := statetest.Policies(2)
	rotate := &alone[1].Rules[5]
	rotate.Approvals, rotate.Sites = 1, 1
	for _, n := range sites {
		if got := problems(alone, custodiansAt(2, sites...), sites); !strings.Contains(got, "standard: rotate could be decided by "+n+" alone") {
			t.Errorf("%s:\n%s", n, got)
		}
	}
	rotate.Required = []string{"fr"}
	if got := problems(alone, custodiansAt(2, sites...), sites); strings.Contains(got, "alone") {
		t.Errorf("fr is named:\n%s", got)
	}
	rotate.Required = nil
	for _, c := range state.Cases(alone, custodiansAt(2, sites...), sites) {
		c.Alone = true
		if got := c.Problems(approval.Simulate(c.Rule, custodiansAt(2, sites...), "spiffe://fr.example/operator/anna")); len(got) > 0 {
			t.Errorf("meant: %v", got)
		}
	}
	// Losses: of a site where all must agree, of a site's only custodian for what is
	// the site's own, but not of the site itself for that.
	all := problems(statetest.Policies(3), custodiansAt(2, sites...), sites)
	if !strings.Contains(all, "standard: destroy would be locked out by the loss of site de or site fr or site jp") || strings.Contains(all, "custodian (revoke)") {
		t.Errorf("three of three:\n%s", all)
	}
	few := slices.DeleteFunc(custodiansAt(2, sites...), func(c approval.Custodian) bool { return c.ID == "jp-2" })
	got := problems(statetest.Policies(2), few, sites)
	if !strings.Contains(got, "governance: node (one of jp) would be locked out by the loss of custodian jp-1") || strings.Contains(got, "site jp") || strings.Contains(got, "only credential") {
		t.Errorf("one custodian of jp:\n%s", got)
	}
	few[len(few)-1].Credentials = few[len(few)-1].Credentials[:1]
	if got := problems(statetest.Policies(2), few, sites); !strings.Contains(got, "custodian jp-1 or the only credential of jp-1") {
		t.Errorf("one credential of jp-1:\n%s", got)
	}
	// What nobody can do, and what a group asks for.
	group := statetest.Policies(2)
	group[1].Rules[5].Need = &approval.Group{Need: 1, Sites: []approval.SiteWeight{{Name: "jp", Weight: 1, Approvals: 2}}}
	got = problems(group, few, sites)
	if !strings.Contains(got, "standard: rotate can never be approved; it would take: 2 custodians of site jp (1 so far)") ||
		!strings.Contains(got, "governance: custodian (one of de) can never be approved") {
		t.Errorf("a group beyond reach:\n%s", got)
	}
}
