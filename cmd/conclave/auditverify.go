package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/parallel"
)

// progressEvery is how often a verification says how far it is.
const progressEvery = 2 * time.Second

func (a *app) auditVerifyCommand() *cobra.Command {
	var cluster, since, remember string
	cmd := &cobra.Command{
		Use:   "verify DIR --cluster ID",
		Short: "Verify exported logs offline, trusting nothing but the cluster's identity",
		Long: `Verify the logs that nodes export ([audit] export, or conclaved audit export). Every leaf
is hashed and held against the tiles and the checkpoint; every command of the cluster
log is carried out again from the genesis document, with all its signatures, and must
have the outcome that the log says; the hash of the state is compared where sites have
cosigned it; the evidence of every decision is verified; the cosigners' keys follow from
the log itself. What no majority of the sites has cosigned is printed.

An older copy of a log is in order in itself. Who verifies again and again remembers
what was seen: --remember FILE reads it, and writes it when all is in order; --since FILE
only reads it.`,
		Args: arguments("DIR"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if cluster == "" {
				return usagef("--cluster is missing: the identity of the cluster that you expect; see: conclave status")
			}
			if since != "" && remember != "" {
				return usagef("--since and --remember are two ways to name the same; give one of them")
			}
			seen, err := readSeen(cluster, since, remember)
			if err != nil {
				return err
			}
			opts := audit.DirOptions{Cluster: cluster, Seen: seen.Logs, Spread: parallel.Do, Progress: progressTo(cmd.ErrOrStderr(), time.Now)}
			report, err := audit.VerifyDir(cmd.Context(), args[0], opts)
			if report.Cluster != "" {
				err = errors.Join(err, a.show(cmd, report, func(w io.Writer) { dirTable(w, report, err == nil) }))
			}
			if err == nil && remember != "" {
				err = seen.with(report).save(remember)
			}
			return err
		},
	}
	cmd.Flags().StringVar(&cluster, "cluster", "", "`ID` of the cluster (required)")
	cmd.Flags().StringVar(&since, "since", "", "`FILE` with what was seen of the logs before")
	cmd.Flags().StringVar(&remember, "remember", "", "`FILE` to remember what is seen in; it is made if missing")
	return cmd
}

// progressTo prints how far a verification is, now and then.
func progressTo(w io.Writer, now func() time.Time) func(audit.Progress) {
	last := now()
	return func(p audit.Progress) {
		if t := now(); t.Sub(last) >= progressEvery {
			last = t
			fmt.Fprintf(w, "%s: %d of %d\n", p.Doing, p.Done, p.Of)
		}
	}
}

func dirTable(w io.Writer, r audit.DirReport, good bool) {
	row(w, "LOG", "LEAVES", "COSIGNED", "NOT COSIGNED", "SIGNED BY", "NEWEST LEAF")
	for _, l := range r.Logs {
		row(w, l.Log, l.Size, l.Cosigned, tail(l.Tail, l.TailMS), or(strings.Join(l.Sites, ", "), "-"), when(l.Newest))
	}
	row(w)
	row(w, "ok", fmt.Sprintf("%d commands carried out again, %d of them without effect, as at the time", r.Commands, r.Refused))
	row(w, "ok", fmt.Sprintf("%d cosigned checkpoints in the cluster log; the state was compared at %d places", r.Checkpoints, r.States))
	row(w, "ok", fmt.Sprintf("evidence of %d decisions; of %d it is erased with the key material", r.Evidence, r.Erased))
	row(w, "tail", fmt.Sprintf("not cosigned by a majority of the sites: %s", tail(r.Tail, r.TailMS)))
	for _, n := range r.Notes {
		row(w, "note", n)
	}
	for _, f := range r.Findings {
		row(w, "WRONG", f)
	}
	if good {
		row(w, "verified", fmt.Sprintf("cluster %s (%s), epoch %d", r.ClusterName, r.Cluster, r.Epoch))
	}
}

func tail(leaves uint64, ms int64) string {
	return fmt.Sprintf("%d leaves, %.1f s", leaves, float64(ms)/1000)
}

// seenLogs is the file that remembers what was seen of the logs of a cluster.
type seenLogs struct {
	Format  int              `json:"format"` // 1
	Cluster string           `json:"cluster"`
	Logs    []audit.SeenHead `json:"logs"`
}

// readSeen reads the memory from either file. One to remember in need not be there.
func readSeen(cluster, since, remember string) (seenLogs, error) {
	s := seenLogs{Format: 1, Cluster: cluster}
	path := or(since, remember)
	if path == "" {
		return s, nil
	}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) && remember != "" {
		return s, nil
	}
	if err == nil {
		dec := json.NewDecoder(strings.NewReader(string(b)))
		dec.DisallowUnknownFields()
		err = dec.Decode(&s)
	}
	if err != nil || s.Format != 1 {
		return s, kms.Wrap(kms.Invalid, err, path+", which remembers the logs, is not readable", "restore it; without it a log that was rolled back is not noticed")
	}
	if s.Cluster != cluster {
		return s, kms.Errorf(kms.Conflict, "%s is about cluster %s, not %s", path, s.Cluster, cluster)
	}
	return s, nil
}

// with returns the memory with what a verification has seen: all logs that it held, or a
// finding, so nothing that was seen before is missing.
func (s seenLogs) with(r audit.DirReport) seenLogs {
	s.Logs = r.Seen
	return s
}

func (s seenLogs) save(path string) error {
	b, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	return replace(path, append(b, '\n'))
}
