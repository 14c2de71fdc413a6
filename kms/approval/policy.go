package approval

import (
	"fmt"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
)

// Validate checks the policy's name and rules: sorted by action, exactly one for
// every action (at most one for kms.LaterActions) that a policy of its name decides (kms.GovernanceActions for the
// policy kms.Governance, which has no keyrings and so is not Attested, else
// kms.KeyActions). Errors: kms.Invalid.
func (p Policy) Validate() error {
	if err := kms.CheckName("policy", p.Name); err != nil {
		return err
	}
	decides := kms.KeyActions
	if p.Name == kms.Governance {
		decides = kms.GovernanceActions
		if p.Attested {
			return kms.Errorf(kms.Invalid, "policy %s decides about no keyring, so it cannot ask for attested hardware; write it in the keyrings' policies", p.Name)
		}
	}
	if err := p.validateForbid(); err != nil {
		return err
	}
	for i, r := range p.Rules {
		if !slices.Contains(decides, r.Action) {
			return kms.Errorf(kms.Invalid, "policy %s has a rule for %q, which it does not decide", p.Name, r.Action)
		}
		if i > 0 && p.Rules[i-1].Action >= r.Action {
			return kms.Errorf(kms.Invalid, "policy %s: rules are not sorted by action or repeat %q", p.Name, r.Action)
		}
		if err := r.Validate(); err != nil {
			return kms.Errorf(kms.Invalid, "policy %s: %v", p.Name, err)
		}
		if r.Need == nil {
			continue
		}
		if err := r.Need.checkSize(); err != nil {
			return kms.Errorf(kms.Invalid, "policy %s: rule for %q: %v", p.Name, r.Action, err)
		}
	}
	for _, a := range decides {
		if _, ok := p.Rule(a); !ok && !slices.Contains(kms.LaterActions, a) {
			return kms.Errorf(kms.Invalid, "policy %s has no rule for %q; write one, direct or quorum", p.Name, a)
		}
	}
	return nil
}

// Rule returns the rule for an action.
func (p Policy) Rule(a kms.Action) (Rule, bool) {
	for _, r := range p.Rules {
		if r.Action == a {
			return r, true
		}
	}
	return Rule{}, false
}

// Possible reports whether every quorum rule can be met by the custodians who
// have a credential that counts, and whether everybody who may veto is a custodian. Errors are
// kms.Invalid with the arithmetic in the message.
func (p Policy) Possible(custodians []Custodian) error {
	known := make(map[string]bool, len(custodians))
	bySite := make(map[string]int)
	active := make(map[string]bool)
	for _, c := range custodians {
		known[c.ID] = true
		if c.canVote() && !active[c.ID] {
			active[c.ID] = true
			bySite[c.Site]++
		}
	}
	for _, r := range p.Rules {
		if len(r.Direct) > 0 {
			continue
		}
		if why := r.impossible(tally{active, bySite}, known); why != "" {
			return kms.Errorf(kms.Invalid, "policy %s: rule for %q %s", p.Name, r.Action, why)
		}
	}
	return nil
}

// impossible says why no set of the custodians counted could meet the rule, or
// returns "".
func (r Rule) impossible(all tally, known map[string]bool) string {
	active, bySite := len(all.custodians), all.sites
	if !r.Quorum() {
		return "has no thresholds"
	}
	var absent []string
	for _, s := range r.Required {
		if bySite[s] == 0 {
			absent = append(absent, s)
		}
	}
	// One approval of each required site is needed beside all other arithmetic.
	needSites := max(int(r.Sites), len(r.Required))
	need := max(int(r.Approvals), needSites)
	switch {
	case need > active:
		return fmt.Sprintf("needs %s, but there %s that %s not revoked", plural(need, "approval"), isAre(active, "custodian"), verb(active))
	case needSites > len(bySite):
		return fmt.Sprintf("needs approvals from %s, but the %s %s at %s", plural(needSites, "site"),
			plural(active, "custodian"), verb(active), plural(len(bySite), "site"))
	case len(absent) > 0:
		return fmt.Sprintf("requires site %s, where no custodian is that is not revoked", strings.Join(absent, ", "))
	}
	for _, v := range r.Veto {
		if !known[v] {
			return fmt.Sprintf("gives a veto to %s, who is no custodian", v)
		}
	}
	if r.Need != nil {
		return r.Need.impossible(all, known)
	}
	return ""
}

func plural(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func verb(n int) string {
	if n == 1 {
		return "is"
	}
	return "are"
}

func isAre(n int, what string) string { return verb(n) + " " + plural(n, what) }
