package cluster_test

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/cluster/clustertest"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// five are the sites of a coalition with one node each.
var five = statetest.Options{Sites: []string{"de", "fr", "jp", "no", "us"}}

// Five nodes far from one another, over wires with jitter and loss: the leader stays,
// writes and barriers work at every node, and when the leader dies another takes over.
func TestWAN(t *testing.T) {
	t.Parallel()
	for _, delay := range []time.Duration{20 * time.Millisecond, 150 * time.Millisecond} {
		t.Run(fmt.Sprint(delay), func(t *testing.T) {
			t.Parallel()
			profile, rounds := cluster.LAN, 8
			if 2*delay > cluster.LAN.MaxRTT() {
				profile, rounds = cluster.WAN, 3
			}
			c := clustertest.New(t, clustertest.Options{World: five,
				Delays: clustertest.Delays{OneWay: clustertest.Everywhere(delay), Jitter: delay / 10, Loss: 0.01, Seed: 1},
				Config: func(_ int, cfg *cluster.Config) {
					cfg.Profile, cfg.Timing = profile, cluster.Timing{Propose: clustertest.Patience}
				}})
			leader := c.Leader()
			c.WaitApplied(c.Propose(leader, c.Tick(leader)).Index)
			term := c.Node(leader).Status().Term
			began := time.Now()
			stable(t, c, rounds)
			if s := c.Node(leader).Status(); s.Term != term || s.State != "leader" {
				t.Errorf("the leader has changed for no reason: term %d, was %d, it is a %s", s.Term, term, s.State)
			}
			t.Logf("%d rounds of a write and a barrier at each of 5 nodes in %v", rounds, time.Since(began).Round(time.Millisecond))
			c.Until("the round trips are known", func() bool { // at first they have connections to make
				for _, p := range c.Node(leader).Status().Peers {
					if p.ID != c.Members[leader].ID && (p.RTT < 2*delay || p.RTT > 2*delay+200*time.Millisecond || p.Lag > 10) {
						return false
					}
				}
				return true
			})
			s := c.Node(leader).Status()
			if s.Quorum < 0 || s.Quorum > 3*s.Heartbeat || s.Profile != profile || s.Heartbeat != 10*profile.MaxRTT() {
				t.Errorf("the leader's status: %+v", s)
			}

			c.Kill(leader)
			died := time.Now()
			next := c.Leader()
			t.Logf("another leader after %v", time.Since(died).Round(time.Millisecond))
			if took := time.Since(died); took > 10*s.Heartbeat { // votes may be split, more so on a busy machine
				t.Errorf("a new leader took %v", took)
			}
			c.SameState(c.Propose(next, c.Tick(next)).Index)
		})
	}
}

// stable writes at every node at once, round after round, each followed by a barrier at
// another node, which must then have applied it.
func stable(t *testing.T, c *clustertest.Cluster, rounds int) {
	t.Helper()
	var wg sync.WaitGroup
	for i := range c.Members {
		wg.Go(func() {
			for range rounds {
				r, err := c.Node(i).Propose(t.Context(), c.Tick(i))
				if err != nil {
					t.Errorf("node %d: %v", i, err)
					return
				}
				reader := c.Node((i + 1) % len(c.Members))
				if err := reader.Barrier(t.Context()); err != nil {
					t.Errorf("barrier: %v", err)
				} else if at := reader.State().Index(); at < r.Index {
					t.Errorf("after the barrier node %d is at %d, not %d", i, at, r.Index)
				}
			}
		})
	}
	wg.Wait()
}

// A node measures how far away the others are before it chooses its timing, and
// remembers it for a start at which they do not answer.
func TestAutoProfile(t *testing.T) {
	t.Parallel()
	profile := cluster.LAN
	c := clustertest.New(t, clustertest.Options{
		Delays: clustertest.Delays{OneWay: clustertest.Everywhere(60 * time.Millisecond)},
		Config: func(_ int, cfg *cluster.Config) { cfg.Profile, cfg.Timing = profile, cluster.Timing{} }})
	c.Leader()
	profile = cluster.Auto
	f := c.Follower()
	for _, why := range []string{"measured", "remembered"} {
		c.Kill(f)
		if s := c.Restart(f).Status(); s.Profile != cluster.WAN || s.Heartbeat != 3*time.Second || s.Lease != 1500*time.Millisecond {
			t.Errorf("%s: profile %s, heartbeat %v, lease %v", why, s.Profile, s.Heartbeat, s.Lease)
		}
		for i := range c.Members {
			if i != f {
				c.Kill(i)
			}
		}
	}

	near := clustertest.New(t, clustertest.Options{Config: func(_ int, cfg *cluster.Config) { cfg.Profile, cfg.Timing = profile, cluster.Timing{} },
		World: single})
	if s := near.Node(0).Status(); s.Profile != cluster.WAN {
		t.Errorf("knowing nothing it takes %s", s.Profile)
	}
}

// The lead goes to the preferred site.
func TestPreferredSite(t *testing.T) {
	t.Parallel()
	c := clustertest.New(t, clustertest.Options{Timing: cluster.Timing{Heartbeat: time.Second, Lease: 400 * time.Millisecond}, Config: func(_ int, cfg *cluster.Config) { cfg.PreferSites = []string{"jp", "fr"} }})
	c.Until("the lead is at jp", func() bool { return c.Members[c.Leader()].Site == "jp" })
}
