package cluster_test

import (
	"context"
	"errors"
	"testing"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/cluster/clustertest"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
)

// A leader that is cut off from all others is replaced; what it was asked for
// meanwhile is unknown or refused, never applied by it alone. Back on the network
// it has the state of the others.
func TestLeaderCutOff(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{})
	old := c.Leader()
	c.SameState(c.Propose(old, c.Tick(old)).Index)
	c.Cut(old)
	lost := c.Tick(old)
	ctx, cancel := context.WithTimeout(t.Context(), clustertest.Patience)
	defer cancel()
	if _, err := c.Node(old).Propose(ctx, lost); !errors.Is(err, kms.Unknown) {
		t.Errorf("a proposal at the leader without a quorum: %v", err)
	}
	c.Until("another leader", func() bool { return c.Leader() != old })
	leader := c.Leader()
	var last state.Result
	for i := range c.Members {
		if i != old {
			last = c.Propose(i, c.Tick(i))
		}
	}
	limit := 3 * clustertest.Timing().Heartbeat
	c.Until("the one cut off knows that it is stale", func() bool { return c.Node(old).Fresh() > limit })
	if f := c.Node(leader).Fresh(); f > limit {
		t.Errorf("the leader with a quorum is stale: %v", f)
	}
	short, cancel := context.WithTimeout(t.Context(), clustertest.Timing().Heartbeat)
	defer cancel()
	if err := c.Node(old).Barrier(short); !errors.Is(err, kms.Unavailable) {
		t.Errorf("a barrier at the one cut off: %v", err)
	}
	if _, err := c.Node(old).Propose(short, c.Tick(old)); !errors.Is(err, kms.Unavailable) {
		t.Errorf("a proposal at the one cut off: %v", err)
	}

	c.Heal(old)
	c.WaitApplied(last.Index)
	c.SameState(c.Propose(old, c.Tick(old)).Index)
	c.Until("it is fresh", func() bool { return c.Node(old).Fresh() < limit })
	// What was lost left no trace: it applies now.
	if _, err := c.Node(old).Propose(t.Context(), lost); err != nil {
		t.Errorf("the lost command again: %v", err)
	}
}

// A proposal that waits for a leader that does not answer ends when another node
// leads, long before its deadline.
func TestForwardedToSilentLeader(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{Timing: cluster.Timing{RPC: clustertest.Patience}})
	old, f := c.Leader(), c.Follower()
	c.SameState(c.Propose(f, c.Tick(f)).Index) // the connection stands
	c.Cut(old)
	ctx, cancel := context.WithTimeout(t.Context(), 10*clustertest.Patience)
	defer cancel()
	_, err := c.Node(f).Propose(ctx, c.Tick(f))
	if err != nil && !errors.Is(err, kms.Unknown) {
		t.Errorf("got %v", err)
	}
	if ctx.Err() != nil {
		t.Error("it waited to the end")
	}
}

// A node that is cut off refuses nothing for good, whether it led or followed: what it
// knows may be old. It does once it can ask.
func TestCutOffNodeRefusesNoCommandForGood(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{})
	c.SameState(c.Propose(0, c.Tick(0)).Index)
	for _, i := range []int{c.Leader(), c.Follower()} {
		other := c.Command(i, state.Tick{}, func(e *state.Envelope) { e.Cluster = "another" })
		c.Cut(i)
		ctx, cancel := context.WithTimeout(t.Context(), 4*clustertest.Timing().Heartbeat)
		if _, err := c.Node(i).Propose(ctx, other); !errors.Is(err, kms.Unavailable) {
			t.Errorf("cut off: %v", err)
		}
		cancel()
		c.Heal(i)
		if _, err := c.Node(i).Propose(t.Context(), other); err == nil || errors.Is(err, kms.Unavailable) {
			t.Errorf("reachable: %v", err)
		}
	}
}
