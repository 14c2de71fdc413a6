package cluster_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/cluster/clustertest"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// A data directory is only opened by its own node, and only while nobody else on
// the machine can read it.
func TestDataDir(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{World: statetest.Options{Sites: []string{"de", "fr"}, NodesPerSite: 2}})
	c.Leader()
	c.SameState(c.Propose(0, c.Tick(0)).Index)
	c.Kill(0)
	foreign := clustertest.Prepare(t, clustertest.Options{World: single})
	open := func(name string, want error, change func(*cluster.Config)) {
		t.Helper()
		cfg := c.Config(0)
		change(&cfg)
		n, err := cluster.Open(t.Context(), cfg)
		if err == nil {
			_ = n.Close()
		}
		if !errors.Is(err, want) {
			t.Errorf("%s: got %v, want %v", name, err, want)
		}
	}
	open("the directory of another cluster", kms.Conflict, func(cfg *cluster.Config) {
		*cfg = foreign.Config(0)
		cfg.DataDir = c.Members[0].Dir
	})
	open("the directory of another node", kms.Conflict, func(cfg *cluster.Config) {
		m := c.Members[1]
		cfg.NodeID, cfg.Certificate, cfg.Sign = m.ID, m.Certificate, m.Keys.Sign
	})
	open("a directory in use", kms.Conflict, func(cfg *cluster.Config) { cfg.DataDir = c.Members[1].Dir })
	open("no directory", kms.Invalid, func(cfg *cluster.Config) { cfg.DataDir = "" })
	open("a node of no genesis", kms.Invalid, func(cfg *cluster.Config) { cfg.NodeID = "node-de-7" })
	open("no key", kms.Invalid, func(cfg *cluster.Config) { cfg.Sign = nil })
	open("a genesis with a signature missing", kms.BadSignature, func(cfg *cluster.Config) { cfg.Genesis.Signatures = cfg.Genesis.Signatures[1:] })

	dir := c.Members[0].Dir
	for _, name := range []string{"", "identity.json", "raft.db"} {
		path := filepath.Join(dir, name)
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s was made with mode %v", path, info.Mode())
		}
		if err := os.Chmod(path, info.Mode().Perm()|0o040); err != nil {
			t.Fatal(err)
		}
		open("readable "+name, kms.Invalid, func(*cluster.Config) {})
		if err := os.Chmod(path, info.Mode().Perm()); err != nil {
			t.Fatal(err)
		}
	}
	c.Restart(0)
	c.SameState(c.Propose(0, c.Tick(0)).Index)
	c.Kill(0)

	if err := os.Rename(filepath.Join(dir, "raft.db"), filepath.Join(t.TempDir(), "raft.db")); err != nil {
		t.Fatal(err)
	}
	open("a lost log", kms.Conflict, func(*cluster.Config) {})
	if err := os.WriteFile(filepath.Join(dir, "identity.json"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	open("an unreadable identity", kms.Invalid, func(*cluster.Config) {})
}

// A leader whose disk is nearly full takes no commands, wherever they come from,
// and goes on when there is space again.
func TestDiskNearlyFull(t *testing.T) {
	const total = 10 << 30
	var free atomic.Uint64
	free.Store(total)
	c := clustertest.New(t, clustertest.Options{Timing: cluster.Timing{Stall: time.Minute},
		Config: func(_ int, cfg *cluster.Config) {
			cfg.FreeSpace = func(string) (uint64, uint64, error) {
				if free.Load() == 0 {
					return 0, 0, errors.New("no such disk")
				}
				return free.Load(), total, nil
			}
		}})
	leader := c.Leader()
	for _, left := range []uint64{total/10 - 1, 0} {
		free.Store(left)
		for i := range c.Members {
			_, err := c.Node(i).Propose(t.Context(), c.Tick(i))
			var e *kms.Error
			if !errors.Is(err, kms.ReadOnly) || !errors.As(err, &e) || e.Fix == "" || !strings.Contains(e.Msg, "node ") {
				t.Errorf("%d bytes free, at node %d: %v", left, i, err)
			}
		}
		c.Until("the status says so", func() bool { return c.Node(leader).Status().ReadOnly })
	}
	free.Store(total)
	c.SameState(c.Propose(leader, c.Tick(leader)).Index)
	c.Until("the status says so", func() bool { return !c.Node(leader).Status().ReadOnly })
}

// The threshold is a tenth of the disk or 256 MiB, whichever is more.
func TestDiskThreshold(t *testing.T) {
	var free, total atomic.Uint64
	free.Store(1 << 40)
	total.Store(1 << 40)
	c := clustertest.New(t, clustertest.Options{World: single, Timing: cluster.Timing{Stall: time.Minute},
		Config: func(_ int, cfg *cluster.Config) {
			cfg.FreeSpace = func(string) (uint64, uint64, error) { return free.Load(), total.Load(), nil }
		}})
	for _, d := range []struct {
		free, total uint64
		ok          bool
	}{
		{256 << 20, 512 << 20, true},
		{256<<20 - 1, 512 << 20, false},
		{300 << 20, 2900 << 20, true},
		{280 << 20, 2900 << 20, false},
		{100 << 30, 1000 << 30, true},
		{100<<30 - 1, 1000 << 30, false},
	} {
		free.Store(d.free)
		total.Store(d.total)
		_, err := c.Node(0).Propose(t.Context(), c.Tick(0))
		if d.ok && err != nil || !d.ok && !errors.Is(err, kms.ReadOnly) {
			t.Errorf("%d of %d bytes free: %v", d.free, d.total, err)
		}
	}
	if free, total, err := cluster.FreeSpace(t.TempDir()); err != nil || free == 0 || total < free {
		t.Errorf("%d of %d bytes free, %v", free, total, err)
	}
	if _, _, err := cluster.FreeSpace(t.TempDir() + "/missing"); err == nil {
		t.Error("what does not exist has free space")
	}
}

// A leader whose disk is nearly full hands the lead to a node that has space, so
// that the cluster goes on taking changes.
func TestReadOnlyLeaderHandsOver(t *testing.T) {
	const total = 10 << 30
	var full atomic.Int64
	full.Store(-1)
	c := clustertest.New(t, clustertest.Options{Config: func(i int, cfg *cluster.Config) {
		cfg.FreeSpace = func(string) (uint64, uint64, error) {
			if full.Load() == int64(i) {
				return total / 20, total, nil
			}
			return total, total, nil
		}
	}})
	old := c.Leader()
	full.Store(int64(old))
	c.Until("another leader", func() bool { return c.Leader() != old })
	c.SameState(c.Propose(old, c.Tick(old)).Index)
}

// A disk operation that hangs ends the node.
func TestStall(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{World: single, Timing: cluster.Timing{Stall: 5 * time.Second}})
	c.Leader()
	c.Node(0).Stall()
	select {
	case err := <-c.Node(0).Done():
		if !errors.Is(err, kms.Unavailable) {
			t.Errorf("got %v", err)
		}
	case <-time.After(clustertest.Patience):
		t.Fatal("the node goes on")
	}
}

// hangingLog is a log whose disk hangs when told to.
type hangingLog struct {
	*raft.InmemStore
	hang, gone chan struct{}
}

func (l *hangingLog) Close() error { return nil }

func (l *hangingLog) StoreLogs(logs []*raft.Log) error {
	select {
	case <-l.hang:
		<-l.gone
	default:
	}
	return l.InmemStore.StoreLogs(logs)
}

// What Raft does with its log is watched.
func TestStallOfTheLog(t *testing.T) {
	l := &hangingLog{raft.NewInmemStore(), make(chan struct{}), make(chan struct{})}
	c := clustertest.New(t, clustertest.Options{World: single, Timing: cluster.Timing{Stall: 2 * time.Second},
		Config: func(_ int, cfg *cluster.Config) { cfg.Log = l }})
	t.Cleanup(func() { close(l.gone) }) // before the cluster closes
	c.Leader()
	close(l.hang)
	n, cmd := c.Node(0), c.Tick(0)
	go func() { _, _ = n.Propose(context.Background(), cmd) }() // ends with the node
	select {
	case err := <-n.Done():
		if !errors.Is(err, kms.Unavailable) || !strings.Contains(err.Error(), "writing the log") {
			t.Errorf("got %v", err)
		}
	case <-time.After(clustertest.Patience):
		t.Fatal("the node goes on")
	}
}

// A disk that hangs already when it is asked how full it is ends the node, too.
func TestStallOfTheFileSystem(t *testing.T) {
	hang, gone := make(chan struct{}), make(chan struct{})
	c := clustertest.New(t, clustertest.Options{World: single, Timing: cluster.Timing{Stall: 2 * time.Second}, Config: func(_ int, cfg *cluster.Config) {
		cfg.FreeSpace = func(string) (uint64, uint64, error) {
			select {
			case <-hang:
				<-gone
			default:
			}
			return 1 << 40, 1 << 40, nil
		}
	}})
	t.Cleanup(func() { close(gone) }) // before the cluster closes
	c.Leader()
	close(hang)
	select {
	case err := <-c.Node(0).Done():
		if !errors.Is(err, kms.Unavailable) {
			t.Errorf("got %v", err)
		}
	case <-time.After(clustertest.Patience):
		t.Fatal("the node goes on")
	}
}

// Done is closed without a reason by Close.
func TestClose(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{World: single})
	n := c.Node(0)
	c.Kill(0)
	if err, ok := <-n.Done(); ok || err != nil {
		t.Errorf("got %v", err)
	}
	if _, err := n.Propose(t.Context(), c.Tick(0)); !errors.Is(err, kms.Unavailable) {
		t.Errorf("a proposal to a closed node: %v", err)
	}
}

// After Barrier a node sees what another one has written, and knows that it is fresh.
func TestBarrierAndFreshness(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{})
	c.Leader()
	for round := range 10 {
		writer, reader := round%3, (round+1)%3
		r := c.Propose(writer, c.Tick(writer))
		if err := c.Node(reader).Barrier(t.Context()); err != nil {
			t.Fatal(err)
		}
		if got := c.Node(reader).State().Index(); got < r.Index {
			t.Fatalf("after the barrier node %d is at %d, not %d", reader, got, r.Index)
		}
	}
	limit := 5 * clustertest.Timing().Heartbeat
	for i := range c.Members {
		c.Until("the node is fresh", func() bool { return c.Node(i).Fresh() < limit })
	}
	// Cut off, a node knows less and less.
	leader := c.Leader()
	for i := range c.Members {
		if i != leader {
			c.Kill(i)
		}
	}
	c.Until("it is stale", func() bool { return c.Node(leader).Fresh() > limit })
	c.Restart((leader + 1) % 3)
	c.Until("it is fresh again", func() bool { return c.Node(leader).Fresh() < limit })
}

// A node of the genesis without a vote follows, and proposes like any other.
func TestNonvoter(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{World: statetest.Options{Sites: []string{"de", "fr"}, NodesPerSite: 2}, Change: func(g *state.Genesis) { g.Nodes[3].Voter = false }})
	leader := c.Leader()
	if leader == 3 {
		t.Fatal("it leads")
	}
	c.SameState(c.Propose(3, c.Tick(3)).Index)
	if got := c.Node(leader).Status().Peers[3].Suffrage; got != "nonvoter" {
		t.Errorf("its suffrage is %q", got)
	}
}

// Raft's own log comes through from the level asked for.
func TestRaftLog(t *testing.T) {
	var b bytes.Buffer
	log := slog.New(slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.LevelDebug}))
	cluster.LogRaft(log, slog.LevelWarn, "message", "peers", hclog.Fmt("%d of %d", 2, 3))
	if got := strings.Count(b.String(), "\n"); got != 2 || !strings.Contains(b.String(), `peers="2 of 3"`) || !strings.Contains(b.String(), "level=ERROR") {
		t.Errorf("got %d lines:\n%s", got, b.String())
	}
}
