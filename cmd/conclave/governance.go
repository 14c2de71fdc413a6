package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
)

func (a *app) policyCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "policy", Short: "Look at the approval policies; propose to change one"}
	cmd.AddCommand(
		look(a, &cobra.Command{Use: "list", Short: "List the approval policies, rule by rule"},
			func(ctx context.Context, c *client.Client, _ []string) (wire.Policies, error) { return c.Policies(ctx) },
			policyTable),
		look(a, &cobra.Command{Use: "show NAME", Short: "Show one policy; with -o json as conclave policy set takes it"},
			func(ctx context.Context, c *client.Client, args []string) (wire.Policy, error) {
				all, err := c.Policies(ctx)
				if err != nil {
					return wire.Policy{}, err
				}
				for _, p := range all.Policies {
					if p.Name == args[0] {
						return p, nil
					}
				}
				return wire.Policy{}, &kms.Error{Kind: kms.NotFound, Msg: fmt.Sprintf("there is no policy %q", args[0]), Fix: "see: conclave policy list"}
			},
			func(w io.Writer, p wire.Policy) { policyTable(w, wire.Policies{Policies: []wire.Policy{p}}) }),
		a.policyTestCommand(), a.policySetCommand())
	return cmd
}

func policyTable(w io.Writer, p wire.Policies) {
	row(w, "POLICY", "REVISION", "RULE")
	for _, pol := range p.Policies {
		for _, s := range pol.Summary {
			row(w, pol.Name, pol.Revision, s)
		}
	}
}

// policySetCommand proposes the whole of a policy anew.
func (a *app) policySetCommand() *cobra.Command {
	var file string
	var by proposing
	cmd := &cobra.Command{
		Use:   "set NAME --rules FILE --reason TEXT",
		Short: "Propose the rules of a policy, in place of all that it has, or a new policy",
		Long: `Propose the rules of a policy. FILE is JSON as conclave policy show NAME -o json prints
it: take that, change the rules, and propose it. The stricter of the old and the new
rules decides about the change. Rules for what later releases brought (activate, import,
schedule, site, recover, recovery-key) are added so; while a policy has no rule for an action
nobody may do it.

A rule's "need" is a group that must be met besides its approvals and sites: its members
that are met must weigh at least its need. Members are custodians, sites with the number
of approvals that they take, and groups, each with a weight (1 where none is given):

  "need": {"need": 2, "custodians": [{"name": "fr-1"}], "sites": [{"name": "de", "approvals": 2}],
           "groups": [{"need": 1, "custodians": [{"name": "jp-1"}, {"name": "jp-2"}]}]}

"forbid" names suites (such as "Ed25519") of which nothing new is made under the policy:
keys, versions, sealed copies; under governance: custodians' keys, hardware roots, recovery
keys. What exists stays in use, and conclave drift lists it.

Try it first: conclave policy test NAME --rules FILE`,
		Example: "  conclave policy show governance -o json > governance.json\n  conclave policy set governance --rules governance.json --reason 'a rule to recover'",
		Args:    arguments("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if file == "" {
				return usagef("--rules is missing: a file as conclave policy show %s -o json prints it", args[0])
			}
			if err := by.check(); err != nil {
				return err
			}
			p, err := readPolicy(file)
			if err != nil {
				return err
			}
			if p.Name != "" && p.Name != args[0] {
				return usagef("%s is about policy %s, not %s", file, p.Name, args[0])
			}
			return a.propose(cmd, kms.ActionPolicy, approval.PolicyTarget(args[0]), wire.ProposalParameters{Rules: p.Rules, Attested: &p.Attested, Forbid: slices.Concat([]string{}, p.Forbid)}, by)
		},
	}
	cmd.Flags().StringVar(&file, "rules", "", "JSON `FILE` with the rules")
	by.flags(cmd)
	return cmd
}

// readPolicy reads a policy as conclave policy show -o json prints it.
func readPolicy(file string) (p wire.Policy, err error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return p, usageError{err}
	}
	dec := json.NewDecoder(strings.NewReader(string(b)))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&p); err != nil {
		return p, usagef("%s is no policy as conclave policy show -o json prints it: %w", file, err)
	}
	if len(p.Rules) == 0 {
		return p, usagef("%s has no rules", file)
	}
	return p, nil
}
