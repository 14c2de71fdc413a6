package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/engine"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// coalition is what a simulation is about: from a cluster, or from a genesis document.
type coalition struct {
	policies   []approval.Policy
	custodians []approval.Custodian
	sites      []string
}

// simulated is a case with what custodians can do in it.
type simulated struct {
	Policy     string              `json:"policy"`
	Action     string              `json:"action"`
	About      string              `json:"about,omitempty"`
	OwnSites   []string            `json:"own_sites,omitempty"` // sites whose approval the target itself brings along
	Rule       approval.Rule       `json:"rule"`                // with all that the case adds to the policy's
	Simulation approval.Simulation `json:"simulation"`
	Problems   []string            `json:"problems,omitempty"`
}

// simulation is all that a test says.
type simulation struct {
	Cases    []simulated `json:"cases"`
	Problems int         `json:"problems"`
}

func (a *app) policyTestCommand() *cobra.Command {
	var file, genesis, proposer string
	var meant []string
	cmd := &cobra.Command{
		Use:   "test [NAME]",
		Short: "Simulate policies: who could approve what, and what would lock it out",
		Long: `Simulate the policies in force, or one of them: for every action the smallest quorum
that would do, the loss of which one custodian, credential or site would lock it out, and
which nation could decide it alone. Where the cluster asks for more than the rule says
(to enrol a custodian, to change a policy, for a site's own nodes and CAs) each case is
tried as the cluster would decide it.

--rules simulates a policy from a file, before it is proposed; --genesis needs no cluster
and tries a genesis document, before it is signed. What is simulated is a proposal by an
operator; --proposer tries that of a custodian, whose own approval does not count.

The exit code is 5 if anything can never be approved, if one loss would lock an action
out, or if a nation could decide alone that the rule does not name. To suspend a key is
what one site may do alone; a direct rule says so itself; --alone ACTION says that it is
meant.`,
		Example: "  conclave policy test\n  conclave policy test keys --rules keys.json\n  conclave policy test --genesis genesis.cbor --alone rotate",
		Args:    cobra.MaximumNArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			name := strings.Join(args, "")
			if file != "" && name == "" {
				return usagef("--rules needs the NAME of the policy that they are for")
			}
			world, err := a.coalition(cmd, genesis)
			if err != nil {
				return err
			}
			if file != "" {
				if err := world.replace(name, file); err != nil {
					return err
				}
			}
			if name != "" && !slices.ContainsFunc(world.policies, func(p approval.Policy) bool { return p.Name == name }) {
				return &kms.Error{Kind: kms.NotFound, Msg: fmt.Sprintf("there is no policy %q", name), Fix: "see: conclave policy list"}
			}
			if proposer == "" {
				proposer = kms.Identity{TrustDomain: "simulated.example", Role: "operator", Name: "simulated"}.String()
			}
			s := world.simulate(name, proposer, meant)
			if err := a.show(cmd, s, func(w io.Writer) { simulationTable(w, s) }); err != nil {
				return err
			}
			if s.Problems > 0 {
				return kms.Errorf(kms.Conflict, "%d %s", s.Problems, map[bool]string{true: "problem", false: "problems"}[s.Problems == 1])
			}
			return nil
		},
	}
	f := cmd.Flags()
	f.StringVar(&file, "rules", "", "JSON `FILE` with the rules of NAME, in place of those in force")
	f.StringVar(&genesis, "genesis", "", "genesis document `FILE`, in place of a cluster")
	f.StringVar(&proposer, "proposer", "", "SPIFFE `ID` of who proposes (default: an operator)")
	f.StringSliceVar(&meant, "alone", nil, "`ACTION` that one nation is meant to decide alone; may be repeated")
	return cmd
}

// coalition reads what is simulated.
func (a *app) coalition(cmd *cobra.Command, genesis string) (c coalition, err error) {
	if genesis == "" {
		err := a.asOperator(cmd, func(ctx context.Context, cl *client.Client) error {
			c, err = inForce(ctx, cl)
			return err
		})
		return c, err
	}
	b, err := os.ReadFile(genesis)
	if err != nil {
		return c, usageError{err}
	}
	s, err := state.ParseSignedGenesis(b)
	if err != nil {
		return c, fmt.Errorf("%s: %w", genesis, err)
	}
	g, err := state.ParseGenesis(s.Genesis)
	if err != nil {
		return c, fmt.Errorf("%s: %w", genesis, err)
	}
	for _, s := range g.Sites {
		c.sites = append(c.sites, s.ID)
	}
	c.policies, c.custodians = g.Policies, g.Custodians
	return c, nil
}

func inForce(ctx context.Context, cl *client.Client) (c coalition, err error) {
	policies, err := cl.Policies(ctx)
	if err != nil {
		return c, err
	}
	for _, p := range policies.Policies {
		c.policies = append(c.policies, policyOf(p))
	}
	custodians, err := cl.Custodians(ctx)
	if err != nil {
		return c, err
	}
	for _, x := range custodians {
		record := approval.Custodian{ID: x.ID, Site: x.Site, Revoked: x.Revoked, Revision: x.Revision}
		for _, k := range x.Credentials {
			record.Credentials = append(record.Credentials, approval.Credential{ID: k.ID, Suite: k.Suite, PublicKey: k.PublicKey, Suspended: k.Suspended})
		}
		c.custodians = append(c.custodians, record)
	}
	sites, err := cl.Sites(ctx)
	for _, s := range sites {
		c.sites = append(c.sites, s.ID)
	}
	slices.Sort(c.sites)
	return c, err
}

func policyOf(p wire.Policy) approval.Policy {
	out := approval.Policy{Name: p.Name, Revision: p.Revision, Attested: p.Attested}
	for _, r := range p.Rules {
		out.Rules = append(out.Rules, engine.RuleFromWire(r))
	}
	slices.SortFunc(out.Rules, func(a, b approval.Rule) int { return strings.Compare(string(a.Action), string(b.Action)) })
	return out
}

// replace puts the policy from a file in the place of the one of its name.
func (c *coalition) replace(name, file string) error {
	w, err := readPolicy(file)
	if err != nil {
		return err
	}
	if w.Name != "" && w.Name != name {
		return usagef("%s is about policy %s, not %s", file, w.Name, name)
	}
	if _, err := engine.SuitesFromWire(w.Forbid); err != nil {
		return err
	}
	w.Name = name
	p := policyOf(w)
	if err := p.Validate(); err != nil {
		return err
	}
	c.policies = slices.DeleteFunc(slices.Clone(c.policies), func(o approval.Policy) bool { return o.Name == name })
	c.policies = append(c.policies, p)
	slices.SortFunc(c.policies, func(a, b approval.Policy) int { return strings.Compare(a.Name, b.Name) })
	return nil
}

// simulate tries the cases of one policy, or of all where name is empty. meant are the
// actions that a nation may decide alone.
func (c coalition) simulate(name, proposer string, meant []string) (s simulation) {
	for _, x := range state.Cases(c.policies, c.custodians, c.sites) {
		if name != "" && x.Policy != name {
			continue
		}
		sim := approval.Simulate(x.Rule, c.custodians, proposer)
		x.Alone = slices.Contains(meant, string(x.Action))
		problems := x.Problems(sim)
		s.Problems += len(problems)
		s.Cases = append(s.Cases, simulated{
			Policy: x.Policy, Action: string(x.Action), About: x.About, OwnSites: x.Own, Rule: x.Rule, Simulation: sim, Problems: problems,
		})
	}
	return s
}

func simulationTable(w io.Writer, s simulation) {
	row(w, "POLICY", "ACTION", "ABOUT", "SMALLEST QUORUM", "LOCKED OUT BY THE LOSS OF", "ALONE", "MAY END IT")
	for _, c := range s.Cases {
		quorum, sim := "nobody", c.Simulation
		switch {
		case len(sim.Direct) > 0:
			quorum = "a single " + strings.Join(sim.Direct, " or ")
		case len(sim.Quorums) > 0:
			if quorum = strings.Join(sim.Quorums[0], " "); sim.More || len(sim.Quorums) > 1 {
				quorum += ", or others"
			}
		}
		var losses []string
		for _, l := range sim.LockedOutBy {
			if l.Kind != approval.LossCredential {
				losses = append(losses, l.String())
			}
		}
		ends := strings.Join(sim.Vetoes, " ")
		if sim.AnyVeto {
			ends = "any custodian"
		}
		row(w, c.Policy, c.Action, dash(c.About), quorum, dash(strings.Join(losses, ", ")), dash(strings.Join(sim.NationsAlone, " ")), dash(ends))
	}
	for _, c := range s.Cases {
		for _, p := range c.Problems {
			row(w, "problem: "+p)
		}
	}
}

func dash(s string) string { return or(s, "-") }
