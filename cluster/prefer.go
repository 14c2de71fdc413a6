package cluster

import (
	"context"
	"slices"
	"time"

	"github.com/hashicorp/raft"
)

// Where the lead goes. Each node has its own list of preferred sites. The leader
// hands the lead to another voter only if both lists put that voter's site before
// the leader's, so that two nodes with different lists do not pass it to and fro.

// Damping: a leader leads for settleBeats heartbeats before it hands over, and after an
// attempt it waits preferEvery, twice as long after each failed one, up to preferMost.
const (
	settleBeats = 10
	preferEvery = time.Minute
	preferMost  = 30 * time.Minute
)

// maxLag is how many entries a voter may be behind and still take over at once.
const maxLag = 64

// rank is the place of a site in a list of preferred sites; those that are not in
// it share the last.
func rank(list []string, site string) int {
	if i := slices.Index(list, site); i >= 0 {
		return i
	}
	return len(list)
}

// candidate is a voter as the leader knows it.
type candidate struct {
	id, site string
	pong
}

// better returns the voter that should lead in place of a leader at site here with
// the list prefer, applied up to an index; "" for none.
func better(here string, prefer []string, applied uint64, limit time.Duration, voters []candidate) string {
	best, found := rank(prefer, here), ""
	var rtt time.Duration
	for _, v := range voters {
		r := rank(prefer, v.site)
		switch {
		case r > best, r == best && (found == "" || v.rtt >= rtt):
		case rank(v.Prefer, v.site) >= rank(v.Prefer, here): // it would hand the lead back, or does not care
		case v.ReadOnly, time.Since(v.at)+time.Duration(min(v.Fresh, int64(time.Hour))) > limit, v.Applied+maxLag < applied:
		default:
			best, found, rtt = r, v.id, v.rtt
		}
	}
	return found
}

// preferLoop hands the lead to a preferred site until ctx ends.
func (n *Node) preferLoop(ctx context.Context) {
	if len(n.cfg.PreferSites) == 0 {
		return
	}
	heartbeat := n.cfg.Timing.Heartbeat
	tick := time.NewTicker(heartbeat)
	defer tick.Stop()
	var term uint64
	var since, next time.Time
	pause := preferEvery
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := n.raft.CurrentTerm()
		if n.raft.State() != raft.Leader || now != term {
			term, since = now, time.Now()
			continue
		}
		if time.Since(since) < settleBeats*heartbeat || time.Now().Before(next) || n.readOnly.Load() {
			continue
		}
		to := n.preferred()
		if to == "" {
			continue
		}
		err := n.transferTo(ctx, to)
		if err == nil {
			n.cfg.Logger.Info("the lead goes to a preferred site", "node", to)
			pause = preferEvery
		} else if ctx.Err() == nil {
			n.cfg.Logger.Warn("a node of a preferred site did not take the lead", "node", to, "error", err, "again_in", pause)
			pause = min(2*pause, preferMost)
		}
		next = time.Now().Add(pause)
	}
}

// preferred returns the voter that should lead in this node's place, "" for none.
func (n *Node) preferred() string {
	var voters []candidate
	for _, s := range n.raft.GetConfiguration().Configuration().Servers {
		node, ok := n.State().Node(string(s.ID))
		if !ok || s.Suffrage != raft.Voter || node.ID == n.cfg.NodeID {
			continue
		}
		if p, ok := n.peers.of(node.ID); ok {
			voters = append(voters, candidate{node.ID, node.Site, p})
		}
	}
	return better(n.self.Site, n.cfg.PreferSites, n.raft.AppliedIndex(), 5*n.cfg.Timing.Heartbeat, voters)
}

// transferTo hands the lead to a voter.
func (n *Node) transferTo(ctx context.Context, id string) error {
	return n.await(ctx, func() raft.Future {
		return n.raft.LeadershipTransferToServer(raft.ServerID(id), raft.ServerAddress(id))
	})
}
