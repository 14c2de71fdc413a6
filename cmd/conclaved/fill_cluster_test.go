package main

import (
	"bytes"
	"log/slog"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/cluster/clustertest"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/state"
)

// TestFillerInCluster: a node that was far behind takes over a snapshot, and then has all
// of the cluster log from the others, as the state says that it is.
func TestFillerInCluster(t *testing.T) {
	dir := t.TempDir()
	logs := map[int]*audit.ClusterLog{}
	var snapshots [3]atomic.Int64
	c := clustertest.New(t, clustertest.Options{
		Timing: cluster.Timing{TrailingLogs: 1, SnapshotThreshold: 4, SnapshotInterval: 20 * time.Millisecond},
		Config: func(i int, cfg *cluster.Config) {
			log, ok := logs[i]
			if !ok {
				var err error
				if log, err = audit.OpenClusterLog(filepath.Join(dir, cfg.NodeID)); err != nil {
					t.Fatal(err)
				}
				logs[i] = log
			}
			cfg.Applied, cfg.Records = log.Last(), log.Pack
			cfg.OnApply = func(_ *state.State, raw []byte, r state.Result) {
				if err := log.Append(r.Index, raw, r.Leaf); err != nil {
					t.Error(err)
				}
			}
			cfg.OnRestore = func(st *state.State) {
				if err := log.Restored(st.Index(), st.LogSize(), st.LogRoot()); err != nil {
					t.Error(err)
				}
			}
			cfg.OnSnapshot = func() error {
				snapshots[i].Add(1)
				return log.Sync()
			}
		}})
	t.Cleanup(func() {
		for i, log := range logs {
			c.Kill(i)
			if err := log.Close(); err != nil {
				t.Error(err)
			}
		}
	})
	behind := c.Follower()
	c.Propose(behind, c.Tick(behind))
	c.Kill(behind)
	tick := func(n int) (last state.Result) {
		for range 2 * n { // at the leader: another may learn the entry by a snapshot, which tells no outcome
			i := c.Leader()
			last = c.Propose(i, c.Tick(i))
		}
		return last
	}
	c.WaitApplied(tick(10).Index)
	for _, i := range c.Running() {
		before := snapshots[i].Load()
		c.Until("its log is cut", func() bool { // by a snapshot that began after all that
			tick(1)
			return snapshots[i].Load() >= before+2
		})
	}
	c.Restart(behind)
	c.SameState(tick(1).Index)
	if _, n := logs[behind].Missing(); n == 0 {
		t.Fatal("it took over no snapshot")
	}
	f := filler{node: c.Members[behind].ID, log: slog.New(slog.DiscardHandler), own: logs[behind], others: c.Node(behind)}
	f.fill(t.Context())
	if from, n := logs[behind].Missing(); n > 0 {
		t.Fatalf("%d leaves from %d on are missing", n, from)
	}
	c.SameState(tick(2).Index)
	c.Until("the log is that of the state", func() bool { // it is appended to after the state has changed
		st := c.Node(behind).State()
		got, ok := logs[behind].Root()
		return ok && logs[behind].Size() == st.LogSize() && bytes.Equal(got, st.LogRoot())
	})
}
