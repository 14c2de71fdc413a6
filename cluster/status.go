package cluster

import (
	"context"
	"crypto/tls"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms"
)

// counters count since the start of the node.
type counters struct {
	proposed, forwarded, unknown atomic.Uint64
}

// Status is what a node knows of the cluster and itself.
type Status struct {
	Node        string
	Cluster     string
	Leader      string        // node id, "" if none is known
	State       string        // leader, follower, candidate, stopped
	Term        uint64        // of Raft
	Applied     uint64        // index of the last command applied here
	Committed   uint64        // index of the last entry known to be committed
	LastContact time.Duration // since the leader was last heard, 0 at the leader itself, negative for never
	Fresh       time.Duration // see Node.Fresh
	Quorum      time.Duration // since a quorum last confirmed a leader, as far as is known here; negative for never
	Lease       time.Duration // of a leader without a quorum before it steps down
	Heartbeat   time.Duration // without a word from the leader before an election
	Profile     Profile       // that Heartbeat comes from, "" if it is configured
	ReadOnly    bool          // the disk is nearly full
	Halted      bool
	Probation   string // why the node serves nothing, see Node.Probation; empty if it does
	Peers       []Peer // all nodes, this one included

	// Counts since the start.
	Entries   uint64 // entries applied
	NoEffect  uint64 // of those, recorded without effect
	Proposals uint64 // made here
	Forwarded uint64 // of those, answered by another node
	Unknown   uint64 // of those, ended without a known outcome

	Suspicions []Suspicion // of the leader and of others' clocks
}

// Peer is a node as seen from another.
type Peer struct {
	ID       string
	Site     string
	Address  string // host:port
	Suffrage string // voter, nonvoter, none
	Group    string // TLS group of the last handshake with it, "" for none yet

	// Of another node, from asking it about once a heartbeat.
	RTT   time.Duration // median of the latest round trips, 0 if it never answered
	Heard time.Duration // since it last answered, negative for never
	Lag   uint64        // entries that were committed when it last answered, and not applied there
	Fresh time.Duration // what it said then of its own freshness
}

// Status returns the node's status. It does not block.
func (n *Node) Status() Status {
	st := n.State()
	_, leader := n.raft.LeaderWithID()
	s := Status{
		Node: n.cfg.NodeID, Cluster: st.Cluster(), Leader: string(leader), State: stateName(n.raft.State()),
		Term: n.raft.CurrentTerm(), Applied: st.Index(), Committed: n.raft.CommitIndex(), LastContact: -time.Millisecond,
		Fresh: n.Fresh(), Quorum: n.proofs.age(), Lease: n.cfg.Timing.Lease, Heartbeat: n.cfg.Timing.Heartbeat, Profile: n.profile,
		ReadOnly: n.readOnly.Load(), Halted: n.machine.halted.Load(),
		Entries: n.machine.applied.Load(), NoEffect: n.machine.noops.Load(),
		Proposals: n.counters.proposed.Load(), Forwarded: n.counters.forwarded.Load(), Unknown: n.counters.unknown.Load(),
		Suspicions: n.suspects.list(),
	}
	if err := n.Probation(); err != nil {
		s.Probation = err.Error()
	}
	if n.raft.State() == raft.Leader {
		s.LastContact = 0
	} else if last := n.raft.LastContact(); !last.IsZero() {
		s.LastContact = time.Since(last)
	}
	suffrage := map[string]string{}
	for _, server := range n.raft.GetConfiguration().Configuration().Servers {
		suffrage[string(server.ID)] = suffrageName(server.Suffrage)
	}
	for _, node := range st.Nodes() {
		p := Peer{ID: node.ID, Site: node.Site, Address: node.Address, Suffrage: "none", Heard: -time.Millisecond}
		if a, ok := n.peers.of(node.ID); ok {
			p.RTT, p.Heard, p.Lag, p.Fresh = a.rtt, time.Since(a.at), a.lag, time.Duration(a.Fresh)
		}
		if v, ok := suffrage[node.ID]; ok {
			p.Suffrage = v
		}
		if g, ok := n.wire.group(node.ID); ok {
			p.Group = groupName(g)
		}
		s.Peers = append(s.Peers, p)
	}
	return s
}

// TransferLeadership has another voter take over the lead; raft picks the most
// up-to-date one. Errors: kms.Conflict if this node does not lead,
// kms.Unavailable if it did not succeed.
func (n *Node) TransferLeadership(ctx context.Context) error {
	if n.raft.State() != raft.Leader {
		return kms.Errorf(kms.Conflict, "node %s does not lead", n.cfg.NodeID)
	}
	if err := n.await(ctx, n.raft.LeadershipTransfer); err != nil {
		return kms.Wrap(kms.Unavailable, err, "no other node could take over the lead", "try again")
	}
	return nil
}

func stateName(s raft.RaftState) string {
	switch s {
	case raft.Leader:
		return "leader"
	case raft.Follower:
		return "follower"
	case raft.Candidate:
		return "candidate"
	}
	return "stopped"
}

func suffrageName(s raft.ServerSuffrage) string {
	if s == raft.Voter {
		return "voter"
	}
	return "nonvoter"
}

func groupName(g tls.CurveID) string { return g.String() }
