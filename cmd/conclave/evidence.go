package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/client"
)

func (a *app) evidenceCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "evidence", Short: "Fetch and verify the proof that a proposal was authorised"}
	cmd.AddCommand(a.evidenceGetCommand(), a.evidenceVerifyCommand())
	return cmd
}

// verifiedEvidence is the report on evidence, and what custodians signed.
type verifiedEvidence struct {
	audit.Report
	Signed signedContent `json:"signed"`
}

func (a *app) evidenceGetCommand() *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "get PROPOSAL",
		Short: "Fetch the evidence of an executed proposal",
		Args:  arguments("PROPOSAL"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				b, err := c.Evidence(ctx, args[0])
				if err != nil {
					return err
				}
				if out == "" || out == "-" {
					_, err := cmd.OutOrStdout().Write(b)
					return err
				}
				if err := create(out, b, 0o644); err != nil {
					return err
				}
				fmt.Fprintf(cmd.ErrOrStderr(), "%s: %d bytes; verify it anywhere with: conclave evidence verify %s --cluster ID\n", out, len(b), out)
				return nil
			})
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "`FILE` to write (default: standard output)")
	return cmd
}

func (a *app) evidenceVerifyCommand() *cobra.Command {
	var cluster string
	cmd := &cobra.Command{
		Use:   "verify FILE --cluster ID",
		Short: "Verify evidence offline, trusting nothing but the cluster's identity",
		Long: `Verify evidence offline. Every signature is checked again: of the founding nodes over the
genesis document, of custodians over the proposal, of nodes over the commit and the
receipts; custodians and policies are derived from the genesis document and the
governance decisions since. The cluster's identity (conclave status, or the genesis
document you keep) is the only thing that is trusted. Lines that begin with note
say what the file cannot prove.`,
		Args: arguments("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if cluster == "" {
				return usagef("--cluster is missing: the identity of the cluster that you expect; see: conclave status")
			}
			b, err := os.ReadFile(args[0])
			if err != nil {
				return kms.Wrap(kms.Invalid, err, err.Error(), "")
			}
			e, err := audit.ParseEvidence(b)
			if err != nil {
				return err
			}
			report, err := audit.VerifyEvidence(e, cluster)
			if err != nil {
				return err
			}
			signed, err := contentOf(report.Content.Marshal())
			if err != nil {
				return err
			}
			return a.show(cmd, verifiedEvidence{report, signed}, func(w io.Writer) {
				showSigned(w, signed.Bytes, signed.Content)
				row(w)
				for _, c := range report.Checks {
					row(w, "ok", c)
				}
				for _, n := range report.Notes {
					row(w, "note", n)
				}
				row(w, "verified", args[0])
			})
		},
	}
	cmd.Flags().StringVar(&cluster, "cluster", "", "`ID` of the cluster, 32 hexadecimal digits")
	return cmd
}
