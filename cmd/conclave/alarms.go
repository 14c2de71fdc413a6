package main

import (
	"context"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
)

func (a *app) alarmsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "alarms",
		Short: "Report what is wrong: overdue rotations, nodes that are behind, certificates that end",
		Long: `Report what is wrong, as far as the node that is asked knows. Its access log has an
entry when an alarm begins and when it ends, and its metrics count those that are on. What
is worth knowing besides: conclave drift.

The exit code is 1 when there is an alarm, 0 when there is none.`,
		Args: arguments(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				v, err := c.Alarms(ctx)
				if err != nil {
					return err
				}
				if err := a.show(cmd, v, func(w io.Writer) { alarmsTable(w, v) }); err != nil || len(v.Alarms) == 0 {
					return err
				}
				return fmt.Errorf("alarms: %d", len(v.Alarms))
			})
		},
	}
}

func alarmsTable(w io.Writer, v wire.Alarms) {
	row(w, "ALARM", "ABOUT", "SINCE", "WHAT")
	for _, x := range v.Alarms {
		row(w, x.Kind, x.Subject, when(x.Since), x.Text)
	}
	row(w)
	if v.Hidden > 0 {
		row(w, fmt.Sprintf("left out: %d keyrings that you may not read", v.Hidden))
	}
	row(w, "as node "+v.Node+" sees it")
}
