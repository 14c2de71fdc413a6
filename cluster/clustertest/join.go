package clustertest

import (
	"context"
	"errors"
	"path/filepath"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
)

// Attach has the commands of the World go through the cluster from now on, by any running
// member: proposals are opened, approved and carried out in the log. A command is
// proposed again when its outcome is not known.
func (c *Cluster) Attach() {
	c.t.Helper()
	c.World.SetState(c.Node(c.Leader()).State())
	c.World.Attach(c.apply, func() int64 { return time.Now().UnixMilli() })
	for _, id := range c.World.NodeIDs() { // whose clocks are those of the genesis until then
		c.World.Do(id, state.Tick{})
	}
	c.World.Announce()
}

// apply proposes a command of the World at the leader.
func (c *Cluster) apply(raw []byte) (*state.State, state.Result) {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	for lost := false; ; lost = true {
		n := c.Node(c.Leader())
		r, err := n.Propose(ctx, raw)
		if lost && errors.Is(err, kms.Replayed) { // it was applied the first time, although that answer was lost
			return n.State(), state.Result{Index: r.Index}
		}
		if err == nil || r.Index != 0 {
			return n.State(), r
		}
		if e := (*kms.Error)(nil); errors.As(err, &e) && e.Kind != kms.Unknown && e.Kind != kms.Unavailable { // refused before the log
			return n.State(), state.Result{Kind: e.Kind, Message: e.Msg}
		}
		if ctx.Err() != nil {
			c.t.Fatalf("a command of the test: %v", err)
		}
	}
}

// Join has a new node approved, starts it and returns its index. It is a member that does
// not vote and has yet to adopt its hardware root.
func (c *Cluster) Join(id, site string) int {
	c.t.Helper()
	i, p := c.Newcomer(id, site)
	c.World.Announce()
	c.World.Carry(kms.ActionNode, approval.NodeTarget(id), p)
	c.Restart(i)
	c.Confirmed()
	return i
}

// Newcomer makes a member that the cluster does not know, without starting it, and
// the parameters of the proposal by which it joins.
func (c *Cluster) Newcomer(id, site string) (int, approval.NodeParams) {
	c.t.Helper()
	keys, p := c.World.JoinParams(id, site, false)
	m := &Member{ID: id, Site: site, Address: p.Address, Dir: filepath.Join(c.dir, id),
		Certificate: c.CAs[site].Issue(c.t, NodeURI(site, id)), Keys: keys, listener: c.listeners[id]}
	c.Members = append(c.Members, m)
	c.network.delays.add(m.Address, len(c.Members)-1)
	return len(c.Members) - 1, p
}

// Confirmed waits until the running members know that Raft counts with the members.
func (c *Cluster) Confirmed() {
	c.t.Helper()
	index := c.World.State().Index()
	for _, i := range c.Running() {
		c.Wait(i, "the confirmation of the members", func(st *state.State) bool {
			_, pending := st.PendingMembers()
			return st.Index() >= index && !pending
		})
	}
	c.World.SetState(c.Node(c.Leader()).State())
}

// Adopt has a node that has joined adopt its first hardware root.
func (c *Cluster) Adopt(i int) {
	c.t.Helper()
	id := c.Members[i].ID
	c.World.Reseal(id)
	c.World.Do(id, c.World.AdoptCommand(id))
	c.World.Announce()
	c.World.Do(id, state.Tick{})
}

// Promote has a member approved as a voter.
func (c *Cluster) Promote(i int) { c.changeNode(i, approval.NodePromote) }

// Remove has a member removed. If it runs it ends by itself.
func (c *Cluster) Remove(i int) { c.changeNode(i, approval.NodeRemove) }

func (c *Cluster) changeNode(i int, change approval.NodeChange) {
	c.t.Helper()
	c.World.Carry(kms.ActionNode, approval.NodeTarget(c.Members[i].ID), approval.NodeParams{Change: change})
}
