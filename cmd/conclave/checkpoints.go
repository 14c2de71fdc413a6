package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
)

func (a *app) auditCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "audit", Short: "Look at the audit logs' checkpoints and verify exported logs"}
	cmd.AddCommand(a.auditCheckpointsCommand(), a.auditVerifyCommand())
	return cmd
}

func (a *app) auditCheckpointsCommand() *cobra.Command {
	cmd := look(a, &cobra.Command{Use: "checkpoints", Short: "Show how far the logs are cosigned by the sites"},
		func(ctx context.Context, c *client.Client, _ []string) (wire.Checkpoints, error) {
			return c.AuditCheckpoints(ctx)
		}, checkpointsTable)
	cmd.Long = `Show the last checkpoint of the cluster log and of each node's access log, which
sites have cosigned it, and how long leaves have waited for a majority of the sites
(WINDOW). With -o json each checkpoint comes as a signed note that other tools verify.`
	return cmd
}

func checkpointsTable(w io.Writer, v wire.Checkpoints) {
	row(w, "LOG", "SITE", "LEAVES", "COSIGNED", "WINDOW", "COSIGNATORIES")
	for _, l := range v.Logs {
		var by []string
		for _, s := range l.Sites {
			by = append(by, fmt.Sprintf("%s %d", s.Site, s.Size))
		}
		window := "-"
		if l.WindowMS > 0 {
			window = (time.Duration(l.WindowMS) * time.Millisecond).Round(time.Second).String()
		}
		row(w, l.Log, or(l.Site, "-"), l.Size, l.Cosigned, window, or(strings.Join(by, ", "), "-"))
	}
	for _, alarm := range v.Alarms {
		row(w, "alarm: "+alarm)
	}
}
