package main

import (
	"context"
	"io"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
)

func (a *app) proposalListCommand() *cobra.Command {
	var q wire.ProposalQuery
	var mine bool
	var keyFile string
	cmd := &cobra.Command{
		Use: "list [--mine --custodian-key FILE]", Aliases: []string{"ls"}, Short: "List the proposals, newest first",
		Long: `List the proposals, newest first.
With --mine only those that wait for a custodian: open ones on which this custodian has
not voted and where an approval of theirs would count. Say who that is with --custodian, or
with --custodian-key: of the key file's pair only the public half, FILE.pub, is read.`,
		Args: arguments(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case mine && (q.WaitsFor == "") == (keyFile == ""):
				return usagef("--mine needs to know who: give either --custodian ID or --custodian-key FILE")
			case !mine && (q.WaitsFor != "" || keyFile != ""):
				return usagef("--custodian and --custodian-key go with --mine")
			case q.Limit < 0:
				return usagef("--limit is a number above 0")
			}
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				if keyFile != "" {
					id, err := custodianOf(ctx, c, keyFile)
					if err != nil {
						return err
					}
					q.WaitsFor = id
				}
				list, err := c.Proposals(ctx, q)
				if err != nil {
					return err
				}
				return a.show(cmd, list, func(w io.Writer) { proposalTable(w, list) })
			})
		},
	}
	f := cmd.Flags()
	f.BoolVar(&q.Open, "open", false, "only those that still wait for something")
	f.BoolVar(&mine, "mine", false, "only those that wait for the custodian")
	f.StringVar(&q.WaitsFor, "custodian", "", "with --mine: the custodian's `ID`")
	f.StringVar(&keyFile, "custodian-key", "", "with --mine: the custodian's key `FILE`, beside which is FILE.pub")
	f.StringVar(&q.Target, "target", "", "only those about `TARGET`, such as key/KEYRING/KEY")
	f.StringVar(&q.Action, "action", "", "only those of `ACTION`, such as rotate")
	f.IntVar(&q.Limit, "limit", 0, "the newest `N` only")
	return cmd
}

// custodianOf returns the id of the custodian that a key file belongs to. It reads the
// public half alone.
func custodianOf(ctx context.Context, c *client.Client, keyFile string) (string, error) {
	public, err := readPublic(strings.TrimSuffix(keyFile, ".pub") + ".pub")
	if err != nil {
		return "", usageError{err}
	}
	custodians, err := c.Custodians(ctx)
	if err != nil {
		return "", err
	}
	i := slices.IndexFunc(custodians, func(cu wire.Custodian) bool {
		return slices.ContainsFunc(cu.Credentials, func(k wire.Credential) bool { return k.ID == public.ID })
	})
	if i < 0 {
		return "", kms.Errorf(kms.NotFound, "no custodian of this cluster has the key %s (%s)", public.ID, keyFile)
	}
	return custodians[i].ID, nil
}

func proposalTable(w io.Writer, list []wire.Proposal) {
	row(w, "PROPOSAL", "ACTION", "TARGET", "PROGRESS", "APPROVALS", "SITES", "EXPIRES", "MISSING")
	for _, p := range list {
		missing := or(strings.Join(p.Missing, ", "), "-")
		if p.Progress == "executed" { // whatever has changed since
			missing = "-"
		}
		row(w, p.ID, doing(p), p.Content.Target, p.Progress, p.Approvals, p.Sites, when(p.Content.Expires), missing)
	}
}
