package cluster

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
)

// follower of the state: the leader changes Raft's list one server at a time to the
// members of the state, and confirms it there; a removed node gives itself up.

// followLoop looks after the members until ctx ends.
func (n *Node) followLoop(ctx context.Context) {
	tick := time.NewTicker(n.cfg.Timing.Heartbeat / 4)
	defer tick.Stop()
	var said string
	var gone time.Time // when this node was first seen removed
	var trusted string // the CAs that connections were held against
	strangers, leaving := map[string]time.Time{}, map[raft.ServerID]time.Time{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		n.noteBegun()
		n.keepMembers()
		n.dropStrangers(strangers)
		trusted = n.dropUntrusted(trusted)
		if n.State().Removed(n.cfg.NodeID) {
			if gone.IsZero() {
				gone = time.Now()
			}
			n.leave(ctx, time.Since(gone))
			continue
		}
		err := n.follow(ctx, leaving)
		if err == nil || ctx.Err() != nil {
			said = ""
		} else if text := err.Error(); text != said {
			said = text
			n.cfg.Logger.Error("Raft's list of servers does not follow the cluster's members", "error", err)
		}
	}
}

// dropStrangers ends the connections with nodes that were removed since they connected,
// after the time in which they learn of it. since is when each was first found to be one.
func (n *Node) dropStrangers(since map[string]time.Time) {
	for _, peer := range n.wire.connected() {
		if !n.State().Removed(peer) {
			continue
		}
		if first, ok := since[peer]; !ok {
			since[peer] = time.Now()
		} else if time.Since(first) > 2*n.cfg.Timing.Heartbeat {
			n.cfg.Logger.Info("closing the connections of a node that was removed", "peer", peer)
			n.wire.drop(peer)
		}
	}
}

// dropUntrusted ends the connections that rest on a CA which custodians have taken out of
// its site's bundle since: a certificate is looked at when a connection begins, and the
// connection could outlive the trust for as long as the certificate runs. was is what the last
// call returned.
func (n *Node) dropUntrusted(was string) string {
	st := n.State()
	var now strings.Builder
	for _, s := range st.Sites() {
		fmt.Fprintf(&now, "%s %d\n", s.ID, st.SiteRevision(s.ID))
	}
	if now.String() != was {
		n.wire.recheck(st.Removed) // a removed node is told so first
	}
	return now.String()
}

// noteBegun records that the log of a node that joins has begun.
func (n *Node) noteBegun() {
	if n.dir.id.Initialised || n.raft.LastIndex() == 0 {
		return
	}
	if err := n.dir.initialised(); err != nil {
		n.cfg.Logger.Error("cannot record that the log has begun", "error", err)
	}
}

// follow brings Raft's list a step nearer to the members, as leader. leaving is when
// each removed node was first seen to be one.
func (n *Node) follow(ctx context.Context, leaving map[raft.ServerID]time.Time) error {
	if n.raft.State() != raft.Leader || n.settledMembers() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, n.cfg.Timing.RPC)
	defer cancel()
	// A new leader may not know yet what is committed, and so hold an older state
	// against a newer list.
	if _, _, err := n.leaderProof(ctx); err != nil {
		return nil // it does not lead
	}
	list := n.raft.GetConfiguration()
	st := n.State()
	next, done, err := nextChange(st, list.Configuration())
	switch {
	case err != nil:
		return err
	case done:
		return n.confirmMembers(ctx, st)
	case next.id == raft.ServerID(n.cfg.NodeID): // another leader does it
		return n.TransferLeadership(ctx)
	case next.command == raft.RemoveServer && !n.toldRemoved(next.id, leaving):
		return nil
	}
	err = n.await(ctx, func() raft.Future { return n.changeServer(next, list.Index()) })
	if err != nil {
		return fmt.Errorf("%s of %s: %w", next.command, next.id, err)
	}
	n.cfg.Logger.Info("Raft's list of servers has changed", "node", string(next.id), "change", next.command.String())
	return nil
}

// toldRemoved reports whether a removed node has had time to learn from the leader's
// heartbeats that its removal is committed. Raft sends it nothing after it has left the
// list, and it would seek votes for ever.
func (n *Node) toldRemoved(id raft.ServerID, leaving map[raft.ServerID]time.Time) bool {
	first, seen := leaving[id]
	if !seen {
		leaving[id] = time.Now()
	}
	return seen && time.Since(first) >= n.cfg.Timing.Heartbeat
}

// settledMembers reports whether there is nothing to do for the leader.
func (n *Node) settledMembers() bool {
	st := n.State()
	_, pending := st.PendingMembers()
	return !pending && sameServers(n.raft.GetConfiguration().Configuration(), servers(st.Members()))
}

// changeServer makes a change unless the list has changed since the one at index prev.
func (n *Node) changeServer(c change, prev uint64) raft.Future {
	address, limit := raft.ServerAddress(c.id), n.cfg.Timing.RPC
	switch c.command {
	case raft.AddVoter:
		return n.raft.AddVoter(c.id, address, prev, limit)
	case raft.AddNonvoter:
		return n.raft.AddNonvoter(c.id, address, prev, limit)
	case raft.DemoteVoter:
		return n.raft.DemoteVoter(c.id, prev, limit)
	}
	return n.raft.RemoveServer(c.id, prev, limit)
}

// confirmMembers tells the state that Raft's list is that of its members, once that
// list is committed: it can be lost no more.
func (n *Node) confirmMembers(ctx context.Context, st *state.State) error {
	m, ok := st.Membership()
	if !ok || m.Confirmed != 0 || !n.machine.hasMembers(st) {
		return nil
	}
	raw, err := n.command(ctx, st, state.ConfirmMembers{Index: m.Index, Members: st.Members()})
	if err != nil {
		return err
	}
	_, err = n.Propose(ctx, raw)
	if errors.Is(err, kms.Conflict) { // it is confirmed
		return nil
	}
	return err
}

// command signs a command of this node's own with its device.
func (n *Node) command(ctx context.Context, st *state.State, c state.Command) ([]byte, error) {
	env := state.NewEnvelope(c)
	env.Cluster, env.Origin, env.Time = st.Lineage(), n.cfg.NodeID, time.Now().UnixMilli()
	env.Nonce = make([]byte, state.NonceSize)
	_, _ = rand.Read(env.Nonce) // never fails: it ends the process instead
	b := env.Marshal()
	digest, err := pqc.Digest(n.machine.trust.suite, b, []byte(state.CommandContext))
	if err != nil {
		return nil, err
	}
	sig, err := n.cfg.Sign(ctx, digest)
	if err != nil {
		return nil, kms.Wrap(kms.Unavailable, err, "the node's device did not sign a command", "")
	}
	return state.Join(b, sig), nil
}

// prematureConfirmation refuses, at the leader, a confirmation of members that Raft
// has not committed.
func (n *Node) prematureConfirmation(raw []byte) error {
	st := n.State()
	if _, pending := st.PendingMembers(); !pending || n.machine.hasMembers(st) {
		return nil
	}
	b, _, err := state.Split(raw)
	if err != nil {
		return err
	}
	var env state.Envelope
	if err := canon.Unmarshal(b, &env); err != nil || env.Type != state.TypeConfirmMembers {
		return nil // whatever else is wrong with it, Check says
	}
	return kms.Errorf(kms.Conflict, "Raft does not count with the members yet that this confirms")
}
