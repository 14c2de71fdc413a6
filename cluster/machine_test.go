package cluster_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/cluster/clustertest"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
)

// A command that gets into the log past every check changes nothing on any node.
func TestForgedCommandInTheLog(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{})
	leader := c.Leader()
	other := c.Follower()
	good := c.Tick(other)
	c.Propose(leader, good)
	forged := map[string][]byte{
		"garbage":             []byte("not a command"),
		"nothing":             {},
		"another node's name": c.Command(leader, state.Tick{}, func(e *state.Envelope) { e.Origin = c.Members[other].ID }),
		"another cluster":     c.Command(leader, state.Tick{}, func(e *state.Envelope) { e.Cluster = "00000000000000000000000000000000" }),
		"a replay":            good,
		"an old command": c.Command(leader, state.Tick{}, func(e *state.Envelope) {
			e.Time = time.Now().Add(-time.Hour - 11*time.Minute).UnixMilli()
		}),
		"a changed byte": flip(c.Tick(leader)),
	}
	before := c.Node(leader).State()
	for name, raw := range forged {
		resp, err := c.Node(leader).Inject(raw)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		r, ok := resp.(state.Result)
		if !ok || r.Kind == 0 {
			t.Errorf("%s: got %+v, want a recorded refusal", name, resp)
		}
	}
	after := c.Propose(other, c.Tick(other))
	c.SameState(after.Index)
	for i := range c.Members {
		st := c.Node(i).State()
		if got := st.LogSize() - before.LogSize(); got != uint64(len(forged))+1 {
			t.Errorf("node %d recorded %d entries, want %d", i, got, len(forged)+1)
		}
		if got := c.Node(i).Status().NoEffect; got != uint64(len(forged)) {
			t.Errorf("node %d counts %d entries without effect, want %d", i, got, len(forged))
		}
	}
}

func flip(b []byte) []byte {
	b = bytes.Clone(b)
	b[len(b)-1] ^= 1
	return b
}

// A command of a release to come has no effect until all nodes have announced that they
// know it; then it stops those that do not.
func TestUnknownCommandHalts(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{})
	leader := c.Leader()
	c.SameState(c.Propose(leader, c.Tick(leader)).Index)
	later := func() []byte {
		return c.Command(leader, state.Tick{}, func(e *state.Envelope) { e.Version = 99 })
	}
	resp, err := c.Node(leader).Inject(later())
	if r, ok := resp.(state.Result); err != nil || !ok || r.Kind != kms.Unavailable {
		t.Fatalf("a kind that nobody has announced: %+v, %v", resp, err)
	}
	program := state.Program("a later one")
	program.Kinds = append([]state.CommandKind{{Type: state.TypeTick, Version: 99}}, program.Kinds...)
	for i := range c.Members {
		c.Propose(leader, c.Command(i, program, nil))
	}
	raw := later()
	if _, err := c.Node(leader).Propose(t.Context(), raw); !errors.Is(err, state.ErrUnknownCommand) {
		t.Errorf("proposing it: %v", err)
	}
	_, _ = c.Node(leader).Inject(raw) // its future may fail: Raft stops
	select {
	case err := <-c.Node(leader).Done():
		if err == nil {
			t.Error("no reason given")
		}
	case <-time.After(clustertest.Patience):
		t.Fatal("the node goes on")
	}
	n := c.Node(leader)
	before := n.State().Index()
	if _, err := n.Propose(t.Context(), c.Tick(leader)); !errors.Is(err, kms.Unavailable) {
		t.Errorf("a proposal to a halted node: %v", err)
	}
	if s := n.Status(); !s.Halted || s.Fresh < clustertest.Patience || n.State().Index() != before {
		t.Errorf("the status of a halted node is %+v", s)
	}
	if err := n.TakeSnapshot(); err == nil {
		t.Error("a halted node takes a snapshot")
	}
}

// A node restarts from its snapshot and log, with and without its signature over
// the snapshot.
func TestRestartFromSnapshot(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{})
	i := c.Follower()
	for range 5 {
		c.Propose(i, c.Tick(i))
	}
	if err := c.Node(i).TakeSnapshot(); err != nil {
		t.Fatal(err)
	}
	trust := c.Node(i).TrustDir()
	signatures := func() int {
		l, err := filepath.Glob(filepath.Join(trust, "*.sig"))
		if err != nil {
			t.Fatal(err)
		}
		return len(l)
	}
	if signatures() != 1 {
		t.Fatalf("%d signatures over the snapshot", signatures())
	}
	last := c.Propose(i, c.Tick(i))
	c.Kill(i)
	c.Restart(i)
	c.SameState(last.Index)

	// Without the signature everything in the snapshot is verified again, and signed anew.
	c.Kill(i)
	if err := os.RemoveAll(trust); err != nil {
		t.Fatal(err)
	}
	c.Restart(i)
	c.SameState(last.Index)
	c.Until("the verified snapshot is signed", func() bool { return signatures() == 1 })
}

// A node that lags behind the log of the others gets a snapshot.
func TestFarBehind(t *testing.T) {
	var restored atomic.Uint64
	var mu sync.Mutex
	applied := map[uint64]int{}
	behind := -1
	c := clustertest.New(t, clustertest.Options{
		Timing: cluster.Timing{TrailingLogs: 1},
		Config: func(i int, cfg *cluster.Config) {
			if i == behind {
				cfg.OnRestore = func(st *state.State) { restored.Store(st.Index()) }
				cfg.OnApply = func(_ *state.State, _ []byte, r state.Result) {
					mu.Lock()
					defer mu.Unlock()
					applied[r.Index]++
				}
			}
		}})
	behind = c.Follower()
	missed := c.Propose(behind, c.Tick(behind)).Index
	c.Kill(behind)
	var last state.Result
	for range 10 {
		for _, i := range c.Running() {
			last = c.Propose(i, c.Tick(i))
		}
	}
	c.WaitApplied(last.Index)
	for _, i := range c.Running() {
		if err := c.Node(i).TakeSnapshot(); err != nil {
			t.Fatal(err)
		}
		if first, err := c.Node(i).FirstLogEntry(); err != nil || first <= missed+1 {
			t.Fatalf("the log still begins at %d (%v)", first, err)
		}
	}
	c.Restart(behind)
	c.SameState(last.Index)
	if restored.Load() <= missed {
		t.Errorf("restored up to %d only", restored.Load())
	}
	last = c.Propose(behind, c.Tick(behind))
	c.SameState(last.Index)
	mu.Lock()
	defer mu.Unlock()
	if applied[last.Index] != 1 {
		t.Errorf("OnApply saw the last entry %d times", applied[last.Index])
	}
	if applied[missed+1] != 0 {
		t.Error("OnApply saw an entry that came with the snapshot")
	}
}

// A snapshot that would take a node back, or is of another cluster, is refused.
func TestRestoreRefused(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{World: single})
	other := clustertest.New(t, clustertest.Options{World: single})
	c.Leader()
	n := c.Node(0)
	c.Propose(0, c.Tick(0))
	save := func(st *state.State) []byte {
		var b bytes.Buffer
		if err := st.Snapshot(&b); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	thinned := n.State()
	older, now := save(thinned), c.Propose(0, c.Tick(0)).Index
	if err := n.RestoreState(older); !errors.Is(err, kms.Conflict) {
		t.Errorf("an older state: %v", err)
	}
	for range 10 { // the same under a later index
		thinned, _ = thinned.Apply(thinned.Index()+1, []byte("noise"))
	}
	if err := n.RestoreState(save(thinned)); !errors.Is(err, kms.Conflict) || thinned.Index() <= now {
		t.Errorf("an older state that claims entry %d: %v", thinned.Index(), err)
	}
	other.Leader()
	for range 4 {
		other.Propose(0, other.Tick(0))
	}
	if err := n.RestoreState(save(other.Node(0).State())); err == nil {
		t.Error("the state of another cluster was accepted")
	}
	if err := n.RestoreState(save(n.State())[1:]); err == nil {
		t.Error("half a snapshot was accepted")
	}
	if n.State().Index() != now {
		t.Error("the state has changed")
	}
}

// Every node sees the commands in log order, before its proposer gets the answer.
func TestOnApply(t *testing.T) {
	var seen atomic.Uint64
	c := clustertest.New(t, clustertest.Options{World: single, Config: func(_ int, cfg *cluster.Config) {
		cfg.OnApply = func(st *state.State, raw []byte, r state.Result) {
			if was := seen.Swap(r.Index); was >= r.Index || st.Index() != r.Index || len(raw) == 0 {
				t.Errorf("entry %d after %d, state at %d", r.Index, was, st.Index())
			}
		}
	}})
	c.Leader()
	for range 5 {
		if r := c.Propose(0, c.Tick(0)); seen.Load() < r.Index {
			t.Errorf("the answer for %d came first", r.Index)
		}
	}
}

// States are compared between the nodes, and one that differs is found out.
func TestCompareStates(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{Timing: cluster.Timing{HashEvery: 4}})
	leader := c.Leader()
	var at [32]byte
	var size uint64
	for size == 0 {
		r := c.Propose(leader, c.Tick(leader))
		if st := c.Node(leader).State(); st.LogSize()%4 == 0 && st.Index() == r.Index {
			at, size = st.Hash(), st.LogSize()
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), clustertest.Patience)
	defer cancel()
	if err := c.Node(leader).CompareHash(ctx, size, at[:]); err != nil {
		t.Errorf("the right hash: %v", err)
	}
	wrong := flip(at[:])
	c.Until("all nodes have hashed", func() bool { return c.Node(leader).CompareHash(ctx, size, wrong) != nil })
	for i := range c.Members {
		if c.Node(i).Status().Halted {
			t.Errorf("node %d has halted", i)
		}
	}
}

// Who stores entries elsewhere is asked before the log may lose them, and a
// refusal keeps the log.
func TestOnSnapshot(t *testing.T) {
	var calls atomic.Int32
	var fail atomic.Bool
	fail.Store(true)
	c := clustertest.New(t, clustertest.Options{
		Timing: cluster.Timing{TrailingLogs: 1},
		Config: func(_ int, cfg *cluster.Config) {
			cfg.OnSnapshot = func() error {
				calls.Add(1)
				if fail.Load() {
					return errors.New("the disk is full")
				}
				return nil
			}
		}})
	i := c.Leader()
	for range 5 {
		c.Propose(i, c.Tick(i))
	}
	before, err := c.Node(i).FirstLogEntry()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Node(i).TakeSnapshot(); err == nil || calls.Load() != 1 {
		t.Fatalf("a snapshot was kept although what it covers is not durable: %v, %d calls", err, calls.Load())
	}
	if now, err := c.Node(i).FirstLogEntry(); err != nil || now != before {
		t.Fatalf("the log lost entries: it begins at %d, was %d (%v)", now, before, err)
	}
	fail.Store(false)
	if err := c.Node(i).TakeSnapshot(); err != nil || calls.Load() != 2 {
		t.Fatalf("%v after %d calls", err, calls.Load())
	}
}
