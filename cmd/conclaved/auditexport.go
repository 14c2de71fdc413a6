package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/note"
	"github.com/conclave-kms/conclave/kms/state"
)

// exportEvery is how often a node looks whether a log has another checkpoint.
const exportEvery = time.Second

// exportWait is how long a running node leaves a checkpoint to the cosigners first.
const exportWait = 30 * time.Second

// logExport exports a node's logs to a directory, each up to its newest checkpoint.
type logExport struct {
	dir, node string
	access    *audit.Log
	cluster   *audit.ClusterLog
	wait      time.Duration         // for a majority of the sites
	written   map[string][]byte     // the note of each log that is there
	since     map[string]newestHead // that wait
}

type newestHead struct {
	size uint64
	at   time.Time
}

func newLogExport(dir, node string, access *audit.Log, cluster *audit.ClusterLog, wait time.Duration) *logExport {
	return &logExport{dir, node, access, cluster, wait, map[string][]byte{}, map[string]newestHead{}}
}

// due reports whether a head is to be exported now: it is cosigned, or has waited for that.
func (x *logExport) due(st *state.State, h audit.Head, now time.Time) bool {
	if len(audit.SitesOf(st, h)) >= audit.Majority(st) {
		return true
	}
	if x.since[h.Log].size != h.Size {
		x.since[h.Log] = newestHead{h.Size, now}
	}
	return now.Sub(x.since[h.Log].at) >= x.wait
}

// one exports a log, unless that was done for the same checkpoint with the same
// cosignatures. It returns whether it wrote anything.
func (x *logExport) one(ctx context.Context, st *state.State, log string) (bool, error) {
	h, ok := audit.LatestHead(st, log)
	if !ok || !x.due(st, h, time.Now()) {
		return false, nil
	}
	b, err := audit.SignedNote(st, h)
	if err != nil || bytes.Equal(b, x.written[log]) {
		return false, err
	}
	if log == note.ClusterLog {
		err = x.cluster.Export(ctx, x.dir, st.SignedGenesis().Marshal(), b)
	} else {
		err = x.access.Export(ctx, x.dir, x.node, b)
	}
	if err == nil {
		x.written[log] = b
	}
	return err == nil, err
}

// all exports both logs.
func (x *logExport) all(ctx context.Context, st *state.State) (wrote []string, err error) {
	for _, log := range []string{note.ClusterLog, note.AccessLog(x.node)} {
		done, e := x.one(ctx, st, log)
		if done {
			wrote = append(wrote, log)
		}
		if e != nil {
			err = errors.Join(err, fmt.Errorf("the log %s: %w", log, e))
		}
	}
	return wrote, err
}

// exportLogs keeps the directory of [audit] export up to date. What goes wrong is said once
// until it is another thing, and keeps nothing else from working.
func (n *node) exportLogs(ctx context.Context) {
	if n.cfg.Audit.Export == "" {
		return
	}
	x := newLogExport(n.cfg.Audit.Export, n.cfg.Node, n.access, n.clusterLog, exportWait)
	tick := time.NewTicker(exportEvery)
	defer tick.Stop()
	for said := ""; ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		_, err := x.all(ctx, n.cluster.State())
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			said = ""
		case err.Error() != said:
			said = err.Error()
			n.log.Warn("the logs are not exported", "dir", x.dir, "err", err)
		}
	}
}

func auditCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "audit", Short: "Export the audit logs of this node"}
	cmd.AddCommand(auditExportCommand())
	return cmd
}

func auditExportCommand() *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:   "export DIR",
		Short: "Export the logs of this node while it does not run",
		Long: `Export the cluster log and this node's access log, each up to the newest checkpoint that
the cluster log holds, to a directory that any static file server can serve. The node must
not run: a running one does the same by itself with [audit] export in its configuration.
No device is needed. It may be repeated on the same directory and goes on where it ended;
verify it with: conclave audit verify DIR --cluster ID.`,
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := loadConfig(config)
			if err != nil {
				return err
			}
			return exportOffline(cmd.Context(), cfg, args[0], cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVarP(&config, "config", "c", "conclaved.toml", "configuration file")
	return cmd
}

func exportOffline(ctx context.Context, cfg Config, dir string, print io.Writer) (err error) {
	access, err := audit.Open(filepath.Join(cfg.DataDir, "access"), audit.Options{})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, access.Close()) }()
	cluster, err := audit.OpenClusterLog(filepath.Join(cfg.DataDir, "cluster-log"))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, cluster.Close()) }()
	st, err := stateOf(ctx, cfg, cluster)
	if err != nil {
		return err
	}
	x := newLogExport(dir, cfg.Node, access, cluster, 0)
	if _, err := x.all(ctx, st); err != nil {
		return err
	}
	for log := range x.written {
		h, _ := audit.LatestHead(st, log)
		fmt.Fprintf(print, "exported  %s: %d leaves, of which a majority of the sites has cosigned %d\n", log, h.Size, audit.CosignedSize(st, log, h.Restart))
	}
	if len(x.written) == 0 {
		fmt.Fprintln(print, "nothing is exported: the cluster log holds no checkpoint yet")
	}
	return nil
}

// stateOf carries out the commands of a cluster log from the genesis on.
func stateOf(ctx context.Context, cfg Config, log *audit.ClusterLog) (*state.State, error) {
	signed, err := readSignedGenesis(cfg.Genesis)
	if err != nil {
		return nil, err
	}
	st, err := state.New(signed)
	if err != nil {
		return nil, err
	}
	const at = 256 // commands read at once
	for first, size := uint64(0), log.Size(); first < size; first += at {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		err := log.Records(first, int(min(at, size-first)), func(r audit.Record) (err error) {
			st, err = audit.Replay(st, r)
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	return st, nil
}
