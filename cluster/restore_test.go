package cluster_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/cluster/clustertest"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// offline is a member's data directory while it does not run.
func offline(c *clustertest.Cluster, i int) cluster.Offline {
	m := c.Members[i]
	n, _ := c.World.State().Node(m.ID)
	return cluster.Offline{NodeID: m.ID, DataDir: m.Dir, Genesis: c.Genesis, Sign: m.Keys.Sign, SigningSuite: n.SigningSuite, Signing: n.Signing}
}

func load(t *testing.T, c *clustertest.Cluster, i int) cluster.Found {
	t.Helper()
	f, err := offline(c, i).Load(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// recovered returns the first state of the next epoch.
func recovered(t *testing.T, c *clustertest.Cluster, from *state.State, voters ...string) *state.State {
	t.Helper()
	p := c.World.RecoverStatement(from, voters...)
	p.Created = time.Now().UnixMilli()
	p.Expires = p.Created + time.Hour.Milliseconds()
	st, err := from.Recover(c.World.ApproveRecovery(p, "de-1", "fr-1"))
	if err != nil {
		t.Fatal(err)
	}
	return st
}

func begin(t *testing.T, c *clustertest.Cluster, st *state.State, members ...int) {
	t.Helper()
	for _, i := range members {
		if _, err := offline(c, i).Begin(t.Context(), st); err != nil {
			t.Fatal(err)
		}
	}
}

// tick is a tick of a member in the epoch that it is in.
func tick(c *clustertest.Cluster, i int) []byte {
	return c.Command(i, state.Tick{}, func(e *state.Envelope) { e.Cluster = c.Node(i).State().Lineage() })
}

// TestRecoverWithSurvivor: two of three nodes are lost, the third goes on with a
// recovery alone. A node that comes back with its old disk is not part of it: it
// learns that from the survivor, verified by its own custodians, and stops. Set up
// from the same recovery it comes back without a vote.
func TestRecoverWithSurvivor(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{World: statetest.Options{CustodiansPerSite: 1}})
	leader := c.Leader()
	last := c.Propose(leader, c.Tick(leader))
	c.SameState(last.Index)
	for i := range c.Members {
		c.Kill(i)
	}
	survivor, old := 0, 1
	if _, err := offline(c, survivor).Begin(t.Context(), c.World.State()); !errors.Is(err, kms.Invalid) {
		t.Errorf("a directory from a state that is none after a recovery: %v", err)
	}
	found := load(t, c, survivor)
	if found.State.Index() < last.Index || found.Last < last.Index || found.Term == 0 {
		t.Fatalf("the survivor holds the log up to %d (state %d, term %d), %d was acknowledged", found.Last, found.State.Index(), found.Term, last.Index)
	}
	st := recovered(t, c, found.State, c.Members[survivor].ID)
	begin(t, c, st, survivor)
	if kept, _ := filepath.Glob(c.Members[survivor].Dir + ".before-*"); len(kept) != 1 {
		t.Errorf("what was there is kept as %v", kept)
	}
	if _, err := offline(c, survivor).Begin(t.Context(), st); !errors.Is(err, kms.Exists) {
		t.Errorf("a second time: %v", err)
	}

	c.Restart(survivor)
	if got := c.Leader(); got != survivor {
		t.Fatalf("%d leads", got)
	}
	last = c.Propose(survivor, tick(c, survivor))
	if s := c.Node(survivor).Status(); s.Term <= 1<<32 || c.Node(survivor).State().Epoch() != 1 {
		t.Errorf("term %d in epoch %d", s.Term, c.Node(survivor).State().Epoch())
	}
	if _, err := c.Node(survivor).Propose(t.Context(), c.Tick(survivor)); !errors.Is(err, kms.Invalid) {
		t.Errorf("a command of the old history: %v", err)
	}

	// The old disk.
	back := c.Restart(old)
	select {
	case err := <-back.Done():
		if err == nil || !strings.Contains(err.Error(), "epoch 1") {
			t.Errorf("the old node halts with %v", err)
		}
	case <-time.After(clustertest.Patience):
		t.Fatal("the node with the old disk goes on")
	}
	if s := back.Status(); s.Leader != "" {
		t.Errorf("the old node followed %q", s.Leader)
	}
	c.Kill(old)
	if got := c.Node(survivor).State().Index(); got < last.Index {
		t.Errorf("the survivor is at %d", got)
	}

	// The same node, set up from the recovery.
	begin(t, c, st, old)
	c.Restart(old)
	last = c.Propose(survivor, tick(c, survivor))
	c.SameState(last.Index)
	if n, _ := c.Node(old).State().Node(c.Members[old].ID); n.Voter {
		t.Error("it votes")
	}
	last = c.Propose(old, tick(c, old)) // forwarded
	c.SameState(last.Index)

	// And everybody starts again from what is on disk.
	for _, i := range c.Running() {
		c.Kill(i)
	}
	if got := load(t, c, old).State; got.Epoch() != 1 || got.Index() < last.Index {
		t.Errorf("epoch %d, index %d", got.Epoch(), got.Index())
	}
	c.Restart(survivor)
	c.Restart(old)
	c.SameState(c.Propose(old, tick(c, old)).Index)
}

// A node joins a cluster that was recovered: it was introduced to that history. Without an
// introduction it is of epoch 0, and nobody speaks of Raft with it.
func TestJoinAfterRecovery(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{World: statetest.Options{CustodiansPerSite: 1}})
	leader := c.Leader()
	c.SameState(c.Propose(leader, c.Tick(leader)).Index)
	var all []int
	var voters []string
	for i, m := range c.Members {
		c.Kill(i)
		all, voters = append(all, i), append(voters, m.ID)
	}
	begin(t, c, recovered(t, c, load(t, c, leader).State, voters...), all...)
	for _, i := range all {
		c.Restart(i)
	}
	c.Attach()

	i, p := c.Newcomer("node-fr-2", "fr")
	c.World.Announce()
	c.World.Carry(kms.ActionNode, approval.NodeTarget("node-fr-2"), p)
	st := c.World.State()
	for says, in := range map[string]cluster.Introduction{
		"epoch 1":  {Epoch: 1},
		"lineage ": {Lineage: st.Lineage()},
	} {
		cfg := c.Config(i)
		cfg.Listener, cfg.Introduced = nil, in
		if _, err := cluster.Open(t.Context(), cfg); !errors.Is(err, kms.Invalid) || !strings.Contains(err.Error(), says) {
			t.Errorf("%+v: %v", in, err)
		}
	}
	c.Restart(i)
	c.Confirmed()
	c.Adopt(i)
	c.SameState(c.Propose(i, tick(c, i)).Index)
	c.Kill(i)
	c.Restart(i)
	c.SameState(c.Propose(i, tick(c, i)).Index)
}

// TestRecoverInterrupted: a node does not start on half a recovery.
func TestRecoverInterrupted(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{World: single})
	last := c.Propose(0, c.Tick(0))
	if _, err := offline(c, 0).Load(t.Context()); !cluster.InUse(err) {
		t.Errorf("while the node runs: %v", err)
	}
	c.Kill(0)
	if got := load(t, c, 0).State.Index(); got < last.Index {
		t.Errorf("index %d, %d was acknowledged", got, last.Index)
	}
	if err := os.Mkdir(c.Members[0].Dir+".new", 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := cluster.Open(t.Context(), c.Config(0)); !errors.Is(err, kms.Conflict) || !strings.Contains(err.Error(), "recover again") {
		t.Errorf("with half a recovery: %v", err)
	}
	o := offline(c, 0)
	o.DataDir += ".nowhere"
	if _, err := o.Load(t.Context()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nowhere: %v", err)
	}
}
