package cluster_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/cluster/clustertest"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// A node joins, catches up from nothing, is promoted, leads, and is removed again: Raft's list
// follows what custodians have approved, and the removed node says why it ends.
func TestMembership(t *testing.T) {
	t.Parallel()
	c := clustertest.New(t, clustertest.Options{})
	c.Attach()
	old := c.Leader()
	site := c.Members[old].Site
	joins := "node-" + site + "-2"
	suffrage := func(id string) string {
		for _, p := range c.Node(c.Leader()).Status().Peers {
			if p.ID == id {
				return p.Suffrage
			}
		}
		return "gone"
	}
	i := c.Join(joins, site)
	if got := suffrage(joins); got != "nonvoter" {
		t.Fatalf("the new node is a %s", got)
	}
	c.SameState(c.Propose(0, c.Tick(0)).Index)
	c.Kill(i) // and again, with a log of its own
	c.Restart(i)
	c.Adopt(i)
	c.Promote(i)
	c.Confirmed()
	if got := suffrage(joins); got != "voter" {
		t.Fatalf("the promoted node is a %s", got)
	}
	c.SameState(c.Propose(i, c.Tick(i)).Index)

	// The leader itself is removed.
	id := c.Members[old].ID
	n := c.Node(old)
	lead := func(i int) {
		c.Until("the lead is at "+c.Members[i].ID, func() bool {
			leader := c.Leader()
			if leader != i {
				_ = c.Node(leader).TransferTo(t.Context(), c.Members[i].ID) // again if it fails
			}
			return leader == i
		})
	}
	lead(old)
	c.Remove(old)
	select {
	case err := <-n.Done():
		if !errors.Is(err, kms.Conflict) || !strings.Contains(err.Error(), "was removed from the cluster by proposal") {
			t.Errorf("the removed node ends with %v", err)
		}
	case <-time.After(clustertest.Patience):
		t.Fatal("the removed node goes on")
	}
	c.Kill(old)
	c.Confirmed()
	if got := suffrage(id); got != "gone" {
		t.Errorf("the removed node is a %s", got)
	}
	if _, err := cluster.Open(t.Context(), c.Config(old)); !errors.Is(err, kms.Conflict) {
		t.Errorf("it starts again: %v", err)
	}
	c.SameState(c.Propose(i, c.Tick(i)).Index)

	// Whoever restarts now has the list from a snapshot or from the log, and knows the
	// leader although the log says nothing of it yet.
	lead(i)
	for k, j := range c.Running() {
		if k == 0 {
			if err := c.Node(j).TakeSnapshot(); err != nil {
				t.Fatal(err)
			}
		}
		c.Kill(j)
		c.Restart(j)
	}
	c.Wait(i, "itself as a member", func(st *state.State) bool { _, ok := st.Node(joins); return ok })
	c.Leader() // a proposal that meets the last death itself may be kms.Unknown
	c.SameState(c.Propose(i, c.Tick(i)).Index)
}

// A node that was off when it was removed hears of it from the others when it comes back,
// ends, and has called no election meanwhile.
func TestRemovedWhileOff(t *testing.T) {
	t.Parallel()
	c := clustertest.New(t, clustertest.Options{})
	c.Attach()
	off := c.Follower()
	c.SameState(c.Propose(off, c.Tick(off)).Index)
	c.Kill(off)
	c.Remove(off)
	c.Confirmed()
	leader := c.Leader()
	term := c.Node(leader).Status().Term
	n := c.Restart(off)
	select {
	case err := <-n.Done():
		if !errors.Is(err, kms.Conflict) || !strings.Contains(err.Error(), "was removed from the cluster by proposal") {
			t.Errorf("it ends with %v", err)
		}
	case <-time.After(clustertest.Patience):
		t.Fatal("it goes on")
	}
	c.Kill(off)
	if now := c.Node(leader).Status().Term; now != term || c.Leader() != leader {
		t.Errorf("it has disturbed the others: term %d, was %d", now, term)
	}
	if _, err := cluster.Open(t.Context(), c.Config(off)); !errors.Is(err, kms.Conflict) {
		t.Errorf("it starts again: %v", err)
	}
}

// A removed node that does not give itself up is hung up on by the others.
func TestRemovedIsHungUpOn(t *testing.T) {
	t.Parallel()
	c := clustertest.New(t, clustertest.Options{Timing: cluster.Timing{Heartbeat: time.Second, Lease: 400 * time.Millisecond},
		World: statetest.Options{NodesPerSite: 2}, Change: func(g *state.Genesis) {
			for i := range g.Nodes {
				g.Nodes[i].Voter = i%2 == 0
			}
		}})
	c.Attach()
	const stubborn = 1 // does not vote
	id := c.Members[stubborn].ID
	c.Cut(stubborn) // so it does not learn of its removal, while its connections stay
	c.Remove(stubborn)
	c.Until("nobody holds a connection with it", func() bool {
		for _, i := range c.Running() {
			if i != stubborn && slices.Contains(c.Node(i).Connected(), id) {
				return false
			}
		}
		return true
	})
	if c.Node(stubborn).State().Removed(id) {
		t.Error("it has learnt of its removal all the same")
	}
}

// A connection does not outlive the trust in the CA that it rests on.
func TestUntrustedIsHungUpOn(t *testing.T) {
	t.Parallel()
	c := clustertest.New(t, clustertest.Options{})
	c.Attach()
	i := c.Follower()
	site, id := c.Members[i].Site, c.Members[i].ID
	c.SameState(c.Propose(0, c.Tick(0)).Index)
	fresh := clustertest.NewCA(t, "another CA of "+site)
	c.World.Carry(kms.ActionSite, approval.SiteTarget(site), approval.SiteParams{Change: approval.SiteCAs, CAs: [][]byte{fresh.Certificate.Raw}})
	c.Until("nobody holds a connection with a node whose CA is gone", func() bool {
		for _, k := range c.Running() {
			if k != i && slices.Contains(c.Node(k).Connected(), id) {
				return false
			}
		}
		return true
	})
}

// A list of servers that nobody has approved gets into no log but that of the leader
// that made it up, and is gone when another one leads.
func TestForgedServers(t *testing.T) {
	t.Parallel()
	c := clustertest.New(t, clustertest.Options{})
	leader := c.Leader()
	c.SameState(c.Propose(leader, c.Tick(leader)).Index)
	hostile := c.Node(leader)
	forged := make(chan error, 1)
	go func() { forged <- hostile.RemoveServer(raft.ServerID(c.Members[(leader+1)%3].ID)) }()
	c.Until("the leader has a list of its own", func() bool { return len(hostile.Servers()) == 2 })
	short, cancel := context.WithTimeout(t.Context(), 2*clustertest.Timing().Heartbeat)
	defer cancel()
	if _, err := hostile.Propose(short, c.Tick(leader)); !errors.Is(err, kms.Unknown) {
		t.Errorf("a command behind it: %v", err)
	}
	for i := range c.Members {
		if got := len(c.Node(i).Servers()); i != leader && got != 3 {
			t.Errorf("node %d counts %d servers", i, got)
		}
	}
	c.Kill(leader)
	if err := <-forged; err == nil {
		t.Error("the forged list is committed")
	}
	next := c.Leader()
	c.Propose(next, c.Tick(next))
	c.Restart(leader)
	c.SameState(c.Propose(next, c.Tick(next)).Index)
	if got := len(c.Node(leader).Servers()); got != 3 {
		t.Errorf("the leader from before counts %d servers", got)
	}
}
