package main

import (
	"context"
	"encoding/json"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
)

func (a *app) nodeIntroduceCommand() *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "introduce --out FILE",
		Short: "Write down who the members are, for a node that joins and knows only the founders",
		Long: `Write down the members with their addresses, and the sites with their CAs, for a machine
that is to join. It needs that where most nodes of the genesis document are gone or have
another address, and where custodians have recovered the cluster from a backup: conclaved
join --introduction FILE. Nothing in it is secret. It tells the node whom to let connect;
take it from a node that you trust as you do your own.`,
		Args: arguments(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if out == "" {
				return usagef("--out is missing: the file to write")
			}
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				in, err := introduction(ctx, c)
				if err != nil {
					return err
				}
				b, err := json.MarshalIndent(in, "", "  ")
				if err != nil {
					return err
				}
				return create(out, append(b, '\n'), 0o644)
			})
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "`FILE` to write")
	return cmd
}

func introduction(ctx context.Context, c *client.Client) (wire.Introduction, error) {
	in := wire.Introduction{Format: 1}
	st, err := c.Status(ctx)
	if err != nil {
		return in, err
	}
	in.Cluster = st.Cluster
	if st.Epoch > 0 {
		in.Epoch, in.Lineage = st.Epoch, st.Lineage
	}
	nodes, err := c.Nodes(ctx)
	if err != nil {
		return in, err
	}
	for _, n := range nodes {
		in.Nodes = append(in.Nodes, wire.IntroducedNode{ID: n.ID, Site: n.Site, Address: n.Address})
	}
	sites, err := c.Sites(ctx)
	if err != nil {
		return in, err
	}
	for _, s := range sites {
		in.Sites = append(in.Sites, wire.IntroducedSite{ID: s.ID, TrustDomain: s.TrustDomain, CAs: s.CAs})
	}
	return in, nil
}
