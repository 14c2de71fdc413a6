package engine

import (
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/wire"
)

// TestGroupOfARule proposes a rule with a group and a time of release, shows it, and
// decides by it.
func TestGroupOfARule(t *testing.T) {
	w := newWorld(t, "")
	as := w.agents()
	var rules []wire.Rule
	for _, r := range testPolicies()[1].Rules {
		rules = append(rules, ruleView(r))
	}
	at := slices.IndexFunc(rules, func(r wire.Rule) bool { return r.Action == string(kms.ActionRotate) })
	release := w.clock.Now().Add(time.Hour).UTC().Truncate(time.Millisecond)
	rules[at].Approvals, rules[at].Sites, rules[at].NotBefore = 1, 1, release
	rules[at].Need = &wire.Group{Need: 2, Custodians: []wire.Weight{{Name: "jp-a", Weight: 2}, {Name: "de-a"}}, Sites: []wire.SiteWeight{{Name: "fr", Approvals: 1}}}
	req := wire.OpenProposalRequest{Action: "policy", Target: "policy/grouped", Parameters: wire.ProposalParameters{Rules: rules}, Reason: "x"}
	_, err := w.at("de").engine.OpenProposal(bg, caller("operator", "de"), req)
	wantKind(t, err, kms.Invalid) // nobody has announced to know groups
	w.settle(as)
	p := w.propose(kms.ActionPolicy, "policy/grouped", req.Parameters)
	p = w.vote(p, approval.Approve, "fr-a", "de-a", "jp-a")
	for range siteIDs {
		w.settle(as)
		w.clock.Advance(2 * time.Second)
	}
	i := slices.IndexFunc(p.Content.Parameters.Rules, func(r wire.Rule) bool { return r.Action == string(kms.ActionRotate) })
	got := p.Content.Parameters.Rules[i]
	want := &wire.Group{Need: 2, Custodians: []wire.Weight{{Name: "de-a", Weight: 1}, {Name: "jp-a", Weight: 2}}, Sites: []wire.SiteWeight{{Name: "fr", Weight: 1, Approvals: 1}}}
	if !reflect.DeepEqual(got.Need, want) || !got.NotBefore.Equal(release) {
		t.Errorf("%+v, %s", got.Need, got.NotBefore)
	}
	l := check[wire.Policies](t)(w.at("fr").engine.Policies(bg, caller("auditor", "fr")))
	for _, words := range []string{
		"rotate: 1 approval from 1 site, and besides a weight of 2 from: de-a (weighs 1), jp-a (weighs 2), a custodian of site fr (weighs 1)",
		"not before " + release.Format(time.RFC3339),
	} {
		if !slices.ContainsFunc(l.Policies, func(p wire.Policy) bool { return strings.Contains(strings.Join(p.Summary, "\n"), words) }) {
			t.Errorf("no %q in %+v", words, l)
		}
	}

	check[wire.Keyring](t)(w.at("fr").engine.CreateKeyring(bg, caller("operator", "fr"), wire.CreateKeyringRequest{Name: "g", Residency: []string{"fr"}, Policy: "grouped"}))
	w.key("g", "data", kms.Encrypt)
	p = w.propose(kms.ActionRotate, "key/g/data", wire.ProposalParameters{})
	if p = w.vote(p, approval.Approve, "de-a"); p.Met || !slices.Equal(p.Missing, []string{"a weight of 1 from: jp-a (weighs 2), a custodian of site fr (weighs 1)"}) {
		t.Errorf("%+v", p.Missing)
	}
	if p = w.vote(p, approval.Approve, "fr-a"); !p.Met || p.Progress != "waiting" || !p.ExecutableAt.Equal(release) {
		t.Errorf("%s, from %s on", p.Progress, p.ExecutableAt)
	}
}
