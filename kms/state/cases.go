package state

import (
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
)

// Case is an action, and what of its target its rule depends on, with the rule that
// would decide it.
type Case struct {
	Policy string
	Action kms.Action
	About  string   // what of the target; "" where the policy's rule alone decides
	Own    []string // sites whose approval the target itself brings along
	Rule   approval.Rule
	Alone  bool  // one nation is meant to decide it alone
	Err    error // why there is no rule: it cannot be done in one step
}

// Cases lists what policies decide: every rule, and where RuleFor asks for more than
// the rule says, each situation. sites are the cluster's, sorted.
func Cases(policies []approval.Policy, custodians []approval.Custodian, sites []string) (all []Case) {
	enrolled := func(site string) bool {
		return slices.ContainsFunc(custodians, func(c approval.Custodian) bool { return c.Site == site })
	}
	for _, pol := range policies {
		for _, r := range pol.Rules {
			for _, s := range situations(pol, r, policies, sites) {
				c := Case{Policy: pol.Name, Action: r.Action, About: s.about, Own: s.own}
				if r.Action == kms.ActionRecover {
					c.Rule = approval.RecoverRule(r)
				} else {
					nowhere := func(string) (string, bool) { return "", false }
					c.Rule, c.Err = RuleFor(policies, nowhere, enrolled, s.proposal)
				}
				all = append(all, c)
			}
		}
	}
	return all
}

type situation struct {
	about    string
	own      []string
	proposal approval.Proposal // as far as RuleFor looks at it
}

// situations returns what the rule that decides an action depends on. A name that only
// stands for one is example.
func situations(pol approval.Policy, r approval.Rule, policies []approval.Policy, sites []string) (l []situation) {
	const example = "example"
	add := func(about string, own []string, target string, params any) {
		p := approval.Proposal{Action: r.Action, Target: target, Policy: pol.Name, PolicyRevision: pol.Revision}
		if params != nil {
			p.Parameters = canon.Marshal(params)
		}
		l = append(l, situation{about, own, p})
	}
	switch r.Action {
	case kms.ActionPolicy:
		for _, q := range policies {
			add("every rule of "+q.Name, nil, approval.PolicyTarget(q.Name), approval.PolicyParams{Rules: otherRules(q), Attested: q.Attested, Forbid: q.Forbid})
		}
		add("a new policy", nil, approval.PolicyTarget(freeName(policies)), approval.PolicyParams{})
	case kms.ActionCustodian:
		for _, s := range sites {
			add("one of "+s, []string{s}, approval.CustodianTarget(example), approval.CustodianParams{Custodian: approval.Custodian{ID: example, Site: s}})
		}
		add("revoke", nil, approval.CustodianTarget(example), approval.CustodianParams{Custodian: approval.Custodian{ID: example, Revoked: true}})
	case kms.ActionNode:
		for _, s := range sites {
			add("one of "+s, []string{s}, approval.NodeTarget(example), approval.NodeParams{Change: approval.NodeJoin, Site: s})
		}
		add("remove", nil, approval.NodeTarget(example), approval.NodeParams{Change: approval.NodeRemove})
	case kms.ActionSite:
		for _, s := range sites {
			add("CAs of "+s, []string{s}, approval.SiteTarget(s), approval.SiteParams{Change: approval.SiteCAs})
		}
		add("add or remove", nil, approval.SiteTarget(example), approval.SiteParams{Change: approval.SiteAdd})
	case kms.ActionRecoveryKey:
		for _, s := range sites {
			add("keyrings of "+s, []string{s}, approval.RecoveryTarget(example), approval.RecoveryParams{Residency: []string{s}})
		}
	default:
		add("", nil, "", nil)
	}
	return l
}

// otherRules are a policy's rules, each a little different: to set them takes what
// the change of any of them takes.
func otherRules(p approval.Policy) []approval.Rule {
	rules := slices.Clone(p.Rules)
	for i := range rules {
		rules[i].Lifetime++
	}
	return rules
}

// freeName returns a name that no policy has.
func freeName(policies []approval.Policy) string {
	name := "new"
	for slices.ContainsFunc(policies, func(p approval.Policy) bool { return p.Name == name }) {
		name += "-1"
	}
	return name
}

// Problems says what a coalition should know before it relies on the case: that it can
// never be decided, that one loss would lock it out, or that one nation could decide it
// alone without being named for that. A direct rule says so itself, and to suspend a key
// is what one nation may do alone; that a site is lost whose approval the target brings
// along is no news.
func (c Case) Problems(s approval.Simulation) (problems []string) {
	what := c.Policy + ": " + string(c.Action)
	if c.About != "" {
		what += " (" + c.About + ")"
	}
	if c.Err != nil {
		return []string{what + " cannot be done in one step: " + c.Err.Error()}
	}
	if !s.Possible {
		return []string{what + " can never be approved; it would take: " + strings.Join(s.Missing, ", ")}
	}
	var losses []string
	for _, l := range s.LockedOutBy {
		if l.Kind != approval.LossSite || !slices.Contains(c.Own, l.Name) {
			losses = append(losses, l.String())
		}
	}
	if len(losses) > 0 {
		problems = append(problems, what+" would be locked out by the loss of "+strings.Join(losses, " or "))
	}
	if c.Alone || c.Action == kms.ActionSuspend {
		return problems
	}
	named := slices.Concat(c.Rule.Required, c.Rule.GroupSites())
	for _, n := range s.NationsAlone {
		if !slices.Contains(named, n) {
			problems = append(problems, what+" could be decided by "+n+" alone")
		}
	}
	return problems
}
