package state

import (
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

// CheckFounding checks what a new cluster must have beside what Validate says: no site
// decides alone unless the document says so, and a cluster of several sites can be recovered. Whoever makes
// or signs a genesis document asks it. It is no part of Validate, for clusters that were
// founded before there were these rules go on. Errors: kms.Invalid with what to do.
func (g Genesis) CheckFounding() error {
	if err := g.checkMajority(); err != nil {
		return err
	}
	if len(g.Sites) == 1 {
		return nil // recover takes custodians of two sites: it has none, and says by MajoritySite that it is alone
	}
	for _, p := range g.Policies {
		if p.Name == kms.Governance {
			return checkRecoverable(p, g.Custodians)
		}
	}
	return nil // Validate wants the policy
}

func (g Genesis) checkMajority() error {
	voters, total := make(map[string]int), 0
	for _, n := range g.Nodes {
		if n.Voter {
			voters[n.Site]++
			total++
		}
	}
	for _, s := range g.Sites {
		if v := voters[s.ID]; 2*v > total && s.ID != g.MajoritySite {
			return &kms.Error{Kind: kms.Invalid,
				Msg: "genesis: " + majority(s.ID, "has", v, total),
				Fix: "let nodes of other sites vote, or fewer of site " + s.ID + `; if it is meant so, as for a trial or where there is one site, say it in the plan: majority_site = "` + s.ID + `"`}
		}
	}
	if s := g.MajoritySite; s != "" && 2*voters[s] <= total {
		return kms.Errorf(kms.Invalid, "genesis: it says that site %s has the majority of the voters, which it has not (%d of %d): leave that out", s, voters[s], total)
	}
	return nil
}

// majority says what is wrong with it.
func majority(site, has string, v, total int) string {
	return "site " + site + " " + has + " " + decimal(uint64(v)) + " of " + decimal(uint64(total)) + " voters, a majority (more than " + decimal(uint64(total/2)) +
		"): it could decide alone, and without it nobody could"
}

// checkRecoverable checks that custodians could decide a recovery by a governance policy.
func checkRecoverable(p approval.Policy, custodians []approval.Custodian) error {
	const fix = `give the policy a rule for "recover" that the custodians can meet, such as approvals = 3 and sites = 2; it always takes at least two approvals from two sites`
	rule, ok := p.Rule(kms.ActionRecover)
	if !ok || !rule.Quorum() {
		return &kms.Error{Kind: kms.Invalid, Fix: fix,
			Msg: `policy ` + p.Name + ` has no rule for "recover": a cluster that loses its majority, or all its data, could never be brought back`}
	}
	p.Rules = []approval.Rule{approval.RecoverRule(rule)}
	if err := p.Possible(custodians); err != nil {
		return kms.Wrap(kms.Invalid, err, err.Error()+", so the cluster could never be recovered", fix)
	}
	return nil
}
