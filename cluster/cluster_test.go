package cluster_test

import (
	"context"
	"errors"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"github.com/conclave-kms/conclave/cluster/clustertest"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// single is a cluster of one node.
var single = statetest.Options{Sites: []string{"de"}}

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// Commands proposed anywhere are applied everywhere, with equal states.
func TestProposeAnywhere(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{})
	leader := c.Leader()
	var last state.Result
	for i := range c.Members {
		last = c.Propose(i, c.Tick(i))
		if got := c.Node(i).State().Index(); got < last.Index {
			t.Errorf("node %d has applied %d when its proposal %d is answered", i, got, last.Index)
		}
		if len(last.Leaf) == 0 {
			t.Error("the result has no leaf")
		}
	}
	c.SameState(last.Index)
	for i := range c.Members {
		s := c.Node(i).Status()
		if want := c.Members[leader].ID; s.Leader != want {
			t.Errorf("node %s sees %q lead, not %s", s.Node, s.Leader, want)
		}
		if want := i != leader; (s.Forwarded == 1) != want {
			t.Errorf("node %s forwarded %d proposals; it leads: %v", s.Node, s.Forwarded, !want)
		}
	}
}

// Many proposals at once, at all nodes, are all applied.
func TestManyInFlight(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{})
	c.Leader()
	const each = 40
	before := c.Node(0).State().LogSize()
	var wg sync.WaitGroup
	var mu sync.Mutex
	var last uint64
	for i := range c.Members {
		for range each {
			raw := c.Tick(i)
			wg.Go(func() {
				r, err := c.Node(i).Propose(t.Context(), raw)
				if err != nil {
					t.Errorf("node %d: %v", i, err)
				}
				mu.Lock()
				defer mu.Unlock()
				last = max(last, r.Index)
			})
		}
	}
	wg.Wait()
	c.SameState(last)
	if got := c.Node(0).State().LogSize() - before; got != each*uint64(len(c.Members)) {
		t.Errorf("%d entries were applied", got)
	}
}

// A command that Check refuses does not reach the log.
func TestRefusedBeforeTheLog(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{})
	f := c.Follower()
	raw := c.Tick(f)
	r := c.Propose(f, raw)
	if _, err := c.Node(f).Propose(t.Context(), raw); !errors.Is(err, kms.Replayed) {
		t.Errorf("the same command again: %v", err)
	}
	forged := c.Command(f, state.Tick{}, func(e *state.Envelope) { e.Origin = c.Members[(f+1)%3].ID })
	if _, err := c.Node(f).Propose(t.Context(), forged); !errors.Is(err, kms.BadSignature) {
		t.Errorf("a forged command: %v", err)
	}
	if _, err := c.Node(f).Propose(t.Context(), make([]byte, state.MaxCommand+1)); !errors.Is(err, kms.TooLarge) {
		t.Errorf("a huge command: %v", err)
	}
	c.SameState(r.Index)
}

// When the leader dies the others go on, and it catches up when it is back.
func TestLeaderDies(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{})
	dead := c.Leader()
	c.Propose(dead, c.Tick(dead))
	c.Kill(dead)
	c.Leader() // a proposal that meets the death itself may be kms.Unknown
	var last state.Result
	for range 3 {
		for _, i := range c.Running() {
			last = c.Propose(i, c.Tick(i))
		}
	}
	c.SameState(last.Index)
	c.Restart(dead)
	c.SameState(last.Index)
	last = c.Propose(dead, c.Tick(dead))
	c.SameState(last.Index)
}

// The lead is handed over on request.
func TestTransferLeadership(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{})
	old := c.Leader()
	if err := c.Node(c.Follower()).TransferLeadership(t.Context()); !errors.Is(err, kms.Conflict) {
		t.Errorf("a follower: %v", err)
	}
	if err := c.Node(old).TransferLeadership(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.Until("another leader", func() bool { return c.Leader() != old })
	c.SameState(c.Propose(old, c.Tick(old)).Index)
}

// Without a majority nothing is appended, and the caller is told so; a leader
// that has lost its majority cannot say.
func TestNoMajority(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{})
	leader := c.Leader()
	for i := range c.Members {
		if i != leader {
			c.Kill(i)
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), clustertest.Patience)
	defer cancel()
	if _, err := c.Node(leader).Propose(ctx, c.Tick(leader)); !errors.Is(err, kms.Unknown) && !errors.Is(err, kms.Unavailable) {
		t.Errorf("a leader without followers: %v", err)
	}
	c.Until("the leader steps down", func() bool { return c.Node(leader).Status().State != "leader" })
	short, cancel := context.WithTimeout(t.Context(), 2*clustertest.Timing().Heartbeat)
	defer cancel()
	if _, err := c.Node(leader).Propose(short, c.Tick(leader)); !errors.Is(err, kms.Unavailable) {
		t.Errorf("without a leader: %v", err)
	}
	if err := c.Node(leader).Barrier(short); !errors.Is(err, kms.Unavailable) {
		t.Errorf("barrier without a leader: %v", err)
	}
}
