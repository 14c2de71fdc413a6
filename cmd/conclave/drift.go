package main

import (
	"context"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
)

func (a *app) driftCommand() *cobra.Command {
	var all bool
	cmd := &cobra.Command{
		Use:   "drift",
		Short: "Report what is not as it should be: rotations, receipts, use, suites, nodes, certificates",
		Long: `Report what is not as it should be, as far as the node that is asked knows:
keys whose rotation is overdue, versions that a node has not proved it can open, versions
that are asked for although they are no longer active, old versions that are in use or no
longer, suites that are ageing, nodes that are behind, certificates that expire. At the end
stands what a node cannot know.

The exit code is 1 when something asks to be done, 0 when nothing does. What is only worth
knowing does not count; --notes shows it too.`,
		Args: arguments(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				d, err := c.Drift(ctx)
				if err != nil {
					return err
				}
				if err := a.show(cmd, d, func(w io.Writer) { driftTable(w, d, all) }); err != nil || d.Act == 0 {
					return err
				}
				return fmt.Errorf("%d to be done", d.Act)
			})
		},
	}
	cmd.Flags().BoolVar(&all, "notes", false, "show also what asks for nothing (-o json always does)")
	return cmd
}

func driftTable(w io.Writer, d wire.Drift, all bool) {
	row(w, "DRIFT", "ABOUT", "VERSION", "SINCE", "WHAT")
	notes := 0
	for _, f := range d.Findings {
		if !f.Act {
			if notes++; !all {
				continue
			}
		}
		kind, version := f.Kind, "-"
		if !f.Act {
			kind = "(" + kind + ")"
		}
		if f.Version > 0 {
			version = fmt.Sprint(f.Version)
		}
		row(w, kind, f.Subject, version, when(f.Since), f.Text)
	}
	row(w)
	if notes > 0 && !all {
		row(w, fmt.Sprintf("%d more that ask for nothing: --notes", notes))
	}
	if d.Hidden > 0 {
		row(w, fmt.Sprintf("left out: %d keyrings that you may not read", d.Hidden))
	}
	row(w, "as node "+d.Node+" sees it; it does not know "+strings.Join(d.Unknown, ", nor "))
}
