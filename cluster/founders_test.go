package cluster_test

import (
	"testing"
	"time"

	"github.com/conclave-kms/conclave/cluster/clustertest"
	"github.com/conclave-kms/conclave/kms/state"
)

// When no founder is left, a node that was introduced to the present members joins, and
// each of them comes back after a restart although its state begins with the genesis, of whose
// voters none answers.
func TestFoundersGone(t *testing.T) {
	t.Parallel()
	c := clustertest.New(t, clustertest.Options{})
	c.Attach()
	founders := len(c.Members)
	for k := range founders {
		site := c.Members[k].Site
		i := c.Join("node-"+site+"-2", site)
		c.Adopt(i)
		c.Promote(i)
		c.Confirmed()
	}
	for k := range founders {
		n := c.Node(k)
		c.Remove(k)
		select {
		case <-n.Done():
		case <-time.After(clustertest.Patience):
			t.Fatalf("%s goes on", c.Members[k].ID)
		}
		c.Kill(k)
		c.Confirmed()
	}
	i := c.Join("node-fr-3", "fr")
	c.Adopt(i)
	knows := func(i int) {
		t.Helper()
		c.Wait(i, "itself as a member", func(st *state.State) bool { _, ok := st.Node(c.Members[i].ID); return ok })
	}
	knows(i)
	for _, i := range c.Running() {
		c.Kill(i)
		c.Restart(i)
		knows(i)
	}
	c.Leader() // a proposal that meets the last death itself may be kms.Unknown
	c.SameState(c.Propose(i, c.Tick(i)).Index)
}
