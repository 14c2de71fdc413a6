package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
)

// recoveryPlan is a recovery key that the founders want. The document cannot hold it: a
// share is sealed to a custodian's card, which is for one cluster and so for a document that is finished.
// What is planned is checked with the rest, and proposed as the first act of the cluster.
type recoveryPlan struct {
	Name       string   `toml:"name"`
	Residency  []string `toml:"residency"`  // sites of the keyrings that it opens
	Custodians []string `toml:"custodians"` // who hold a share
	Threshold  int      `toml:"threshold"`  // shares that it takes
	Sites      int      `toml:"sites"`      // sites among them, at least 2
}

// checkRecovery checks that what is planned could be proposed, approved and used.
func (p genesisPlan) checkRecovery(g state.Genesis) error {
	for _, r := range p.Recovery {
		if err := r.check(g); err != nil {
			return fmt.Errorf("recovery %q: %w", r.Name, err)
		}
	}
	return nil
}

func (r recoveryPlan) check(g state.Genesis) error {
	if err := kms.CheckName("recovery key", r.Name); err != nil {
		return err
	}
	if len(r.Residency) == 0 {
		return fmt.Errorf("residency is missing: the sites whose keys it is for")
	}
	for _, site := range r.Residency {
		if !slices.ContainsFunc(g.Sites, func(s state.Site) bool { return s.ID == site }) {
			return fmt.Errorf("there is no site %q", site)
		}
		if !slices.ContainsFunc(g.Custodians, func(c approval.Custodian) bool { return c.Site == site }) {
			return fmt.Errorf("site %s has no custodian, and one of each site of the residency must approve it", site)
		}
	}
	holding := map[string]bool{}
	for i, id := range r.Custodians {
		at := slices.IndexFunc(g.Custodians, func(c approval.Custodian) bool { return c.ID == id })
		if at < 0 || slices.Contains(r.Custodians[:i], id) {
			return fmt.Errorf("custodian %q does not exist, or is named twice", id)
		}
		holding[g.Custodians[at].Site] = true
	}
	if r.Sites < 2 || r.Sites > len(holding) || r.Threshold < r.Sites || r.Threshold > len(r.Custodians) {
		return fmt.Errorf("%d shares from %d sites cannot be had of %d custodians of %d sites: sites is 2 or more, threshold no less than that and no more than there are custodians",
			r.Threshold, r.Sites, len(r.Custodians), len(holding))
	}
	for _, pol := range g.Policies {
		if _, ok := pol.Rule(kms.ActionRecoveryKey); pol.Name == kms.Governance && !ok {
			return fmt.Errorf("the policy %s has no rule for %q, so it could not be set", kms.Governance, kms.ActionRecoveryKey)
		}
	}
	return nil
}

// firstActs says what the founders do when the cluster runs.
func (p genesisPlan) firstActs(w io.Writer) {
	if len(p.Recovery) == 0 {
		fmt.Fprintln(w, "no recovery key is planned: if every device of a residency is lost, its keys are. When the cluster runs: conclave recovery create; or plan it now, with [[recovery]]")
		return
	}
	fmt.Fprintln(w, "when the cluster runs, before the first keyring, set the recovery keys:")
	var cards []string
	for _, r := range p.Recovery {
		for _, c := range r.Custodians {
			if !slices.Contains(cards, c) {
				cards = append(cards, c)
				fmt.Fprintf(w, "  conclave recovery card --custodian %s --custodian-key FILE --out %s.card\n", c, c)
			}
		}
	}
	for _, r := range p.Recovery {
		fmt.Fprintf(w, "  conclave recovery create %s --residency %s --threshold %d --sites %d --card %s.card --reason 'as planned at the founding'\n",
			r.Name, strings.Join(r.Residency, ","), r.Threshold, r.Sites, strings.Join(r.Custodians, ".card --card "))
	}
}
