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
	"github.com/conclave-kms/conclave/pqc"
)

// custodianAddCommand proposes a custodian, or other keys for one.
func (a *app) custodianAddCommand() *cobra.Command {
	var site string
	var keys []string
	var by proposing
	cmd := &cobra.Command{
		Use:   "add ID --site SITE --key FILE... --reason TEXT",
		Short: "Propose that a custodian is enrolled, or gets other keys",
		Long: `Propose that a custodian of a site is enrolled with the public keys FILE.pub that
conclave custodian keygen, or conclave custodian token, has written. For a custodian who is there already these keys
take the place of all that were. The first custodians of a new site come so too.`,
		Args: arguments("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if site == "" || len(keys) == 0 {
				return usagef("--site and --key are needed: whose custodian it is, and the public key from conclave custodian keygen")
			}
			if err := by.check(); err != nil {
				return err
			}
			c := wire.Custodian{ID: args[0], Site: site}
			for _, path := range keys {
				k, err := readPublic(path)
				if err != nil {
					return usageError{err}
				}
				c.Credentials = append(c.Credentials, k)
			}
			slices.SortFunc(c.Credentials, func(x, y wire.Credential) int { return strings.Compare(x.ID, y.ID) })
			return a.propose(cmd, kms.ActionCustodian, approval.CustodianTarget(c.ID), wire.ProposalParameters{Custodian: &c}, by)
		},
	}
	cmd.Flags().StringVar(&site, "site", "", "the custodian's `SITE`")
	cmd.Flags().StringArrayVar(&keys, "key", nil, "public key `FILE`.pub; may be repeated")
	by.flags(cmd)
	return cmd
}

func readPublic(path string) (wire.Credential, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return wire.Credential{}, err
	}
	suite, pub, err := pqc.ParsePublic(b)
	if err != nil {
		return wire.Credential{}, fmt.Errorf("%s: %w", path, err)
	}
	return wire.Credential{ID: pqc.Fingerprint(pub), Suite: uint16(suite), PublicKey: pub}, nil
}

// custodianRevokeCommand proposes that a custodian's approvals count no more.
func (a *app) custodianRevokeCommand() *cobra.Command {
	var by proposing
	cmd := &cobra.Command{
		Use:   "revoke ID --reason TEXT",
		Short: "Propose that a custodian is revoked for good",
		Long: `Propose that a custodian is revoked for good: their approvals count no more, not even
those of open proposals, and the name does not come back.`,
		Args: arguments("ID"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := by.check(); err != nil {
				return err
			}
			var record wire.Custodian
			err := a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				all, err := c.Custodians(ctx)
				i := slices.IndexFunc(all, func(x wire.Custodian) bool { return x.ID == args[0] })
				if err == nil && i < 0 {
					err = &kms.Error{Kind: kms.NotFound, Msg: fmt.Sprintf("there is no custodian %q", args[0]), Fix: "see: conclave custodian list"}
				}
				if err == nil {
					record = all[i]
				}
				return err
			})
			if err != nil {
				return err
			}
			next := wire.Custodian{ID: record.ID, Site: record.Site, Credentials: record.Credentials, Revoked: true}
			return a.propose(cmd, kms.ActionCustodian, approval.CustodianTarget(next.ID), wire.ProposalParameters{Custodian: &next}, by)
		},
	}
	by.flags(cmd)
	return cmd
}

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
		a.policySetCommand())
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
rules decides about the change. Rules for what later releases brought (site, recover,
recovery-key) are added so; while a policy has no rule for an action nobody may do it.`,
		Example: "  conclave policy show governance -o json > governance.json\n  conclave policy set governance --rules governance.json --reason 'a rule to recover'",
		Args:    arguments("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if file == "" {
				return usagef("--rules is missing: a file as conclave policy show %s -o json prints it", args[0])
			}
			if err := by.check(); err != nil {
				return err
			}
			b, err := os.ReadFile(file)
			if err != nil {
				return usageError{err}
			}
			var p wire.Policy
			dec := json.NewDecoder(strings.NewReader(string(b)))
			dec.DisallowUnknownFields()
			if err := dec.Decode(&p); err != nil {
				return usagef("%s is no policy as conclave policy show -o json prints it: %w", file, err)
			}
			if len(p.Rules) == 0 {
				return usagef("%s has no rules", file)
			}
			if p.Name != "" && p.Name != args[0] {
				return usagef("%s is about policy %s, not %s", file, p.Name, args[0])
			}
			return a.propose(cmd, kms.ActionPolicy, approval.PolicyTarget(args[0]), wire.ProposalParameters{Rules: p.Rules, Attested: &p.Attested}, by)
		},
	}
	cmd.Flags().StringVar(&file, "rules", "", "JSON `FILE` with the rules")
	by.flags(cmd)
	return cmd
}
