package approval

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
)

const day = int64(24 * 3600 * 1000)

func quorumRule(a kms.Action) Rule {
	r := Rule{Action: a, Approvals: 3, Sites: 2, Lifetime: 14 * day}
	if a == kms.ActionDestroy {
		r.Delay = 7 * day
	}
	return r
}

func policyOf(name string, actions []kms.Action) Policy {
	p := Policy{Name: name, Revision: 1}
	for _, a := range actions {
		p.Rules = append(p.Rules, quorumRule(a))
	}
	slices.SortFunc(p.Rules, func(a, b Rule) int { return strings.Compare(string(a.Action), string(b.Action)) })
	return p
}

func TestRuleValidate(t *testing.T) {
	for name, c := range map[string]struct {
		change func(r *Rule)
		want   string // part of the message, "" for accepted
	}{
		"a quorum":                       {func(r *Rule) {}, ""},
		"one approval":                   {func(r *Rule) { r.Approvals, r.Sites = 1, 1 }, ""},
		"direct":                         {func(r *Rule) { *r = Rule{Action: r.Action, Direct: []string{"operator", "service"}} }, ""},
		"required sites":                 {func(r *Rule) { r.Required = []string{"de", "fr"} }, ""},
		"neither":                        {func(r *Rule) { *r = Rule{Action: r.Action} }, "approvals is missing"},
		"approvals omitted":              {func(r *Rule) { r.Approvals = 0 }, "approvals is missing"},
		"sites omitted":                  {func(r *Rule) { r.Sites = 0 }, "sites is missing"},
		"lifetime omitted":               {func(r *Rule) { r.Lifetime = 0 }, "lifetime is missing"},
		"more sites than approvals":      {func(r *Rule) { r.Sites = 4 }, "3 approvals cannot come from 4 sites"},
		"too many approvals":             {func(r *Rule) { r.Approvals = MaxThreshold + 1 }, "exceeds"},
		"direct and approvals":           {func(r *Rule) { r.Direct = []string{"operator"} }, "choose one"},
		"direct and delay":               {func(r *Rule) { *r = Rule{Action: r.Action, Direct: []string{"operator"}, Delay: 1} }, "choose one"},
		"direct and veto":                {func(r *Rule) { *r = Rule{Action: r.Action, Direct: []string{"operator"}, Veto: []string{"a"}} }, "choose one"},
		"direct and required":            {func(r *Rule) { *r = Rule{Action: r.Action, Direct: []string{"operator"}, Required: []string{"a"}} }, "choose one"},
		"direct and sites":               {func(r *Rule) { *r = Rule{Action: r.Action, Direct: []string{"operator"}, Sites: 1} }, "choose one"},
		"direct and lifetime":            {func(r *Rule) { *r = Rule{Action: r.Action, Direct: []string{"operator"}, Lifetime: day} }, "choose one"},
		"not before a time":              {func(r *Rule) { r.NotBefore = 1 << 41 }, ""},
		"not before no time":             {func(r *Rule) { r.NotBefore = -1 }, "is no time"},
		"a recovery on a day":            {func(r *Rule) { r.Action, r.NotBefore = kms.ActionRecover, 1<<41 }, "cannot wait"},
		"direct and not before":          {func(r *Rule) { *r = Rule{Action: r.Action, Direct: []string{"operator"}, NotBefore: 1} }, "choose one"},
		"an unknown role":                {func(r *Rule) { *r = Rule{Action: r.Action, Direct: []string{"root"}} }, "no role"},
		"roles not sorted":               {func(r *Rule) { *r = Rule{Action: r.Action, Direct: []string{"service", "operator"}} }, "not sorted"},
		"a role twice":                   {func(r *Rule) { *r = Rule{Action: r.Action, Direct: []string{"service", "service"}} }, "repeats"},
		"an unknown action":              {func(r *Rule) { r.Action = "explode" }, "no such action"},
		"required not sorted":            {func(r *Rule) { r.Required = []string{"fr", "de"} }, "not sorted"},
		"required twice":                 {func(r *Rule) { r.Required = []string{"fr", "fr"} }, "repeats"},
		"required ill named":             {func(r *Rule) { r.Required = []string{"Fr"} }, "a-z"},
		"more required than sites":       {func(r *Rule) { r.Required = []string{"de", "fr", "jp"} }, "make sites at least 3"},
		"veto not sorted":                {func(r *Rule) { r.Veto = []string{"b", "a"} }, "not sorted"},
		"a negative delay":               {func(r *Rule) { r.Delay = -1 }, "delay"},
		"a delay of 31 days":             {func(r *Rule) { r.Delay, r.Lifetime = 31*day, 60*day }, "delay"},
		"a short lifetime":               {func(r *Rule) { r.Lifetime = MinLifetime - 1 }, "lifetime"},
		"a long lifetime":                {func(r *Rule) { r.Lifetime = MaxLifetime + 1 }, "lifetime"},
		"a delay as long as the life":    {func(r *Rule) { r.Delay = r.Lifetime }, "not shorter"},
		"destroy after 7 days":           {func(r *Rule) { *r = quorumRule(kms.ActionDestroy) }, ""},
		"destroy after 30 days":          {func(r *Rule) { *r = quorumRule(kms.ActionDestroy); r.Delay, r.Lifetime = 30*day, 60*day }, ""},
		"destroy at once":                {func(r *Rule) { *r = quorumRule(kms.ActionDestroy); r.Delay = 0 }, "7 to 30 days"},
		"destroy after less than 7 days": {func(r *Rule) { *r = quorumRule(kms.ActionDestroy); r.Delay-- }, "7 to 30 days"},
		"destroy after 30 days and more": {func(r *Rule) { *r = quorumRule(kms.ActionDestroy); r.Delay, r.Lifetime = 30*day+1, 60*day }, "30 days"},
		"unused of rotate":               {func(r *Rule) { r.Unused = day }, "for deactivate and destroy alone"},
		"unused of deactivate":           {func(r *Rule) { *r = quorumRule(kms.ActionDeactivate); r.Unused = day }, ""},
		"unused for a minute":            {func(r *Rule) { *r = quorumRule(kms.ActionDeactivate); r.Unused = 60_000 }, "from 1 hour"},
		"unused for 11 years":            {func(r *Rule) { *r = quorumRule(kms.ActionDestroy); r.Unused = 11 * 365 * day }, "to 10 years"},
		"unused, directly":               {func(r *Rule) { *r = Rule{Action: kms.ActionDeactivate, Direct: []string{"operator"}, Unused: day} }, "choose one"},
		"destroy directly":               {func(r *Rule) { *r = Rule{Action: kms.ActionDestroy, Direct: []string{"operator"}} }, "cannot be direct"},
	} {
		t.Run(name, func(t *testing.T) {
			r := quorumRule(kms.ActionRotate)
			c.change(&r)
			err := r.Validate()
			switch {
			case c.want == "" && err != nil:
				t.Error(err)
			case c.want != "" && (!errors.Is(err, kms.Invalid) || !strings.Contains(err.Error(), c.want)):
				t.Errorf("%v, want %q", err, c.want)
			}
		})
	}
}

func TestPolicyValidate(t *testing.T) {
	if err := policyOf("keys", kms.KeyActions).Validate(); err != nil {
		t.Error(err)
	}
	if err := policyOf(kms.Governance, kms.GovernanceActions).Validate(); err != nil {
		t.Error(err)
	}
	for name, change := range map[string]func(p *Policy){
		"no name":                   func(p *Policy) { p.Name = "" },
		"no rules":                  func(p *Policy) { p.Rules = nil },
		"a rule missing":            func(p *Policy) { p.Rules = p.Rules[:len(p.Rules)-1] },
		"a rule twice":              func(p *Policy) { p.Rules = append(p.Rules[:1:1], p.Rules...) },
		"not sorted":                func(p *Policy) { slices.Reverse(p.Rules) },
		"a bad rule":                func(p *Policy) { p.Rules[2].Sites = 0 },
		"a rule it does not decide": func(p *Policy) { p.Rules[0].Action = kms.ActionCustodian },
		"governance of keys":        func(p *Policy) { p.Name = kms.Governance },
		"attested governance":       func(p *Policy) { *p = policyOf(kms.Governance, kms.GovernanceActions); p.Attested = true },
	} {
		p := policyOf("keys", kms.KeyActions)
		change(&p)
		if err := p.Validate(); !errors.Is(err, kms.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, ok := policyOf("keys", kms.KeyActions).Rule(kms.ActionPolicy); ok {
		t.Error("a rule that is not there was found")
	}
}
