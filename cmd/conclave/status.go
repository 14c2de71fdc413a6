package main

import (
	"context"
	"fmt"
	"io"
	"time"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
)

func (a *app) statusCommand() *cobra.Command {
	heard := map[string]time.Time{}
	return look(a, &cobra.Command{Use: "status", Short: "Show how the cluster looks from one node"},
		func(ctx context.Context, c *client.Client, _ []string) (wire.Status, error) {
			s, err := c.Status(ctx)
			if nodes, nerr := c.LocalView().Nodes(ctx); err == nil && nerr == nil { // an addition: whoever may not read it sees the rest
				for _, n := range nodes {
					heard[n.ID] = n.LastHeard
				}
			}
			return s, err
		},
		func(w io.Writer, s wire.Status) { statusTable(w, s, heard) })
}

// statusTable shows a node's status; heard is when each node last signed its time.
func statusTable(w io.Writer, s wire.Status, heard map[string]time.Time) {
	row(w, "cluster", s.Cluster+" ("+s.Name+")")
	if s.Epoch > 0 {
		row(w, "epoch", fmt.Sprintf("%d, history %s: custodians had the cluster go on from a backup", s.Epoch, s.Lineage))
	}
	row(w, "node", s.Node+", site "+s.Site)
	row(w, "device", s.Device)
	if s.Raft != nil {
		row(w, "role", s.Raft.State)
		row(w, "leader", or(s.Raft.Leader, "none"))
		row(w, "lease", lease(s.Raft))
		row(w, "timing", timing(s.Raft))
		row(w, "term, index", fmt.Sprintf("%d, %d", s.Raft.Term, s.Index))
	}
	if s.Raft != nil && s.Raft.Probation != "" {
		row(w, "probation", s.Raft.Probation)
	}
	if s.Raft != nil && s.Raft.ReadOnly {
		row(w, "disk", "nearly full: this node takes no changes and cannot lead; free or add space, it goes on by itself")
	}
	if s.Raft != nil {
		for _, x := range s.Raft.Suspicions {
			row(w, "SUSPICION", fmt.Sprintf("%s, %d times until %s: %s", x.Kind, x.Count, when(x.Last), x.Text))
		}
	}
	for _, line := range s.Waiting {
		row(w, "waiting", line)
	}
	row(w, "up to date", freshness(s.FreshMS))
	row(w, "cluster clock", when(s.Clock)+astray(s.Time, s.Clock))
	row(w, "cluster log", fmt.Sprintf("%d leaves, root %s", s.LogSize, b64(s.LogRoot)))
	row(w, "keyrings", fmt.Sprintf("%d, of which this node opens %d", s.Keys.Keyrings, s.Keys.Resident))
	row(w, "keys", fmt.Sprintf("%d, of which %d overdue for rotation", s.Keys.Keys, s.Keys.Overdue))
	row(w, "open proposals", s.Open)
	row(w, "receipts owed", s.Pending)
	if s.Raft != nil {
		row(w)
		row(w, "PEER", "SITE", "ADDRESS", "SUFFRAGE", "ROUND TRIP", "LAG", "ANSWERED", "LAST HEARD")
		for _, p := range s.Raft.Peers {
			trip, behind, answered := reach(p, s.Node)
			row(w, p.ID, p.Site, p.Address, p.Suffrage, trip, behind, answered, lastHeard(heard[p.ID], s.Clock))
		}
	}
	if len(s.Staleness) > 0 {
		row(w)
		row(w, "KEYRING", "SERVES NOW", "STALENESS", "MAX STALENESS", "BEYOND IT")
		for _, k := range s.Staleness {
			row(w, k.Keyring, serves(k), age(s.FreshMS), milliseconds(k.MaxStalenessMS), map[bool]string{true: "decrypt, verify", false: "nothing"}[k.Survive])
		}
	}
}

// astray says that a node's clock is far from the cluster's, the median of the sites,
// which stands still between two ticks.
func astray(own, cluster time.Time) string {
	d := own.Sub(cluster).Round(time.Second)
	switch {
	case own.IsZero() || cluster.IsZero() || d.Abs() < time.Minute:
		return ""
	case d > 0:
		return fmt.Sprintf("; THIS NODE'S CLOCK IS %s AHEAD: see to its time service", d)
	}
	return fmt.Sprintf("; THIS NODE'S CLOCK IS %s BEHIND: see to its time service", -d)
}

func milliseconds(ms int64) string { return (time.Duration(ms) * time.Millisecond).String() }

// lease says when a majority last confirmed that the leader leads.
func lease(r *wire.Raft) string {
	if r.QuorumMS < 0 {
		return "no leader confirmed by a majority since this node started"
	}
	if r.Leader == "" {
		return "none; a majority last confirmed a leader " + milliseconds(r.QuorumMS) + " ago"
	}
	if r.State == "leader" {
		return fmt.Sprintf("confirmed by a majority %s ago; this node steps down %s after the last confirmation", milliseconds(r.QuorumMS), milliseconds(r.LeaseMS))
	}
	return fmt.Sprintf("%s; by the latest news here a majority confirmed the leader %s ago", milliseconds(r.LeaseMS), milliseconds(r.QuorumMS))
}

// timing says after what time the others replace a leader.
func timing(r *wire.Raft) string {
	from := "configured"
	if r.Profile != "" {
		from = "profile " + r.Profile
	}
	return fmt.Sprintf("an election after %s without the leader (%s)", milliseconds(r.HeartbeatMS), from)
}

// reach says how a peer is reached from the node that tells of it.
func reach(p wire.Peer, self string) (trip, behind, answered string) {
	switch {
	case p.ID == self:
		return "(this node)", "", ""
	case p.HeardMS < 0 || p.RTTUS == 0:
		return "-", "-", "never"
	}
	behind = fmt.Sprintf("%d entries", p.Lag)
	return fmt.Sprintf("%.1f ms", float64(p.RTTUS)/1000), behind, milliseconds(p.HeardMS) + " ago"
}

func serves(k wire.Staleness) string {
	switch {
	case !k.Resident:
		return "nothing: not resident here"
	case k.Serves == "decrypt":
		return "decrypt, verify"
	}
	return k.Serves
}

// age is how old the last proof is that a node is up to date; a node that never had
// one gives the longest time there is.
func age(ms int64) string {
	if ms < (365 * 24 * time.Hour).Milliseconds() {
		return milliseconds(ms)
	}
	return "unknown"
}

func freshness(ms int64) string {
	if a := age(ms); a != "unknown" {
		return "proved " + a + " ago"
	}
	return "not proved since it started"
}

// lastHeard says when a node last signed its time, and that it is silent where that
// is longer ago than a running node ever leaves it.
func lastHeard(at, clock time.Time) string {
	if silent := clock.Sub(at); !at.IsZero() && silent > 15*time.Second {
		return fmt.Sprintf("%s (silent for %s)", when(at), silent.Round(time.Second))
	}
	return when(at)
}
