package cluster_test

import (
	"context"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/cluster/clustertest"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// flipsEnv asks for more flips than a test run has time for: CONCLAVE_FLIPS=2000.
const flipsEnv = "CONCLAVE_FLIPS"

// flips is the disk of a cluster of one node, and what it holds.
type flips struct {
	t     *testing.T
	c     *clustertest.Cluster
	dir   string
	files []string
	index uint64
	hash  [32]byte
	seed  uint64
}

func newFlips(t *testing.T) *flips {
	fast := cluster.Timing{Heartbeat: 80 * time.Millisecond, Election: 40 * time.Millisecond, Lease: 40 * time.Millisecond,
		Commit: 2 * time.Millisecond, TrailingLogs: 8, SnapshotThreshold: 1 << 20, SnapshotInterval: time.Hour}
	f := &flips{t: t, c: clustertest.New(t, clustertest.Options{World: statetest.Options{Sites: []string{"fr"}}, Timing: fast})}
	h := &history{t: t, c: f.c}
	w := f.c.World
	node := w.FirstNode()
	h.do(node, state.Program("this"))
	h.do(node, w.KeyringCommand("vault", "fr"), statetest.As(w.Operator("fr")))
	for i := range 60 {
		h.do(node, w.KeyCommand("vault", fmt.Sprintf("key-%d", i), kms.Encrypt), statetest.As(w.Operator("fr")))
		if i == 20 || i == 40 {
			if err := f.c.Node(0).TakeSnapshot(); err != nil {
				t.Fatal(err)
			}
		}
	}
	f.index, f.hash = w.State().Index(), w.State().Hash()
	f.c.Kill(0)
	f.dir = f.c.Members[0].Dir
	err := filepath.WalkDir(f.dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			f.files = append(f.files, strings.TrimPrefix(path, f.dir+"/"))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	f.seed = rand.Uint64()
	t.Logf("seed %d, files %v", f.seed, f.files)
	return f
}

// open starts the node on a directory and returns its state when it leads and has
// applied all that is committed, or why it does not come to that.
func (f *flips) open(dir string) (*state.State, error) {
	cfg := f.c.Config(0)
	cfg.DataDir, cfg.Listener, cfg.Listen, cfg.Logger = dir, nil, "127.0.0.1:0", slog.New(slog.DiscardHandler)
	n, err := cluster.Open(context.Background(), cfg)
	if err != nil {
		return nil, err
	}
	defer n.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	done := make(chan error, 1)
	go func() { done <- n.Barrier(ctx) }()
	select {
	case err = <-n.Done():
	case err = <-done:
		if ctx.Err() != nil {
			f.t.Errorf("the node neither refuses to start nor gets ready: %v; %+v", err, n.Status())
		}
	}
	return n.State(), err
}

// flip changes a byte of a copy and judges what the node makes of it.
func (f *flips) flip(i int) (detected bool) {
	r := rand.New(rand.NewPCG(f.seed, uint64(i)))
	dir := filepath.Join(f.t.TempDir(), "data")
	copyDir(f.t, f.dir, dir)
	defer os.RemoveAll(dir)
	name := f.files[r.IntN(len(f.files))]
	if r.IntN(2) == 0 {
		name = "raft.db" // which has the most to lose
	}
	path := filepath.Join(dir, name)
	b, err := os.ReadFile(path)
	if err != nil {
		f.t.Fatal(err)
	}
	at, with := r.IntN(len(b)), byte(1+r.IntN(255))
	for range 20 { // most of raft.db is empty: prefer what is not
		if b[at] != 0 {
			break
		}
		at = r.IntN(len(b))
	}
	b[at] ^= with
	if err := os.WriteFile(path, b, 0o600); err != nil {
		f.t.Fatal(err)
	}
	st, err := f.open(dir)
	if err != nil {
		if text := err.Error(); !strings.Contains(text, dir) && !strings.Contains(text, "identity.json") && !strings.Contains(text, "snapshot") {
			f.t.Errorf("%s, byte %d ^ %#02x: the error names no file: %v", name, at, with, err)
		}
		return true
	}
	if st.Index() != f.index || st.Hash() != f.hash {
		f.t.Errorf("%s, byte %d ^ %#02x: served a state at %d with hash %x, want %d with %x", name, at, with, st.Index(), st.Hash(), f.index, f.hash)
	}
	return false
}

// A byte that changes on a node's disk is found when it starts, or does no harm: no
// state is served but the right one.
func TestBitFlips(t *testing.T) {
	f := newFlips(t)
	if st, err := f.open(filepath.Join(f.dir)); err != nil || st.Hash() != f.hash {
		t.Fatalf("the intact disk: %v", err)
	}
	count := 40
	if s := os.Getenv(flipsEnv); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 {
			t.Fatalf("%s=%q is no number of flips", flipsEnv, s)
		}
		count = n
	}
	detected, start := 0, time.Now()
	for i := range count {
		if f.flip(i) {
			detected++
		}
	}
	t.Logf("%d single-byte corruptions in %v: %d detected, %d harmless, %d served wrong", count, time.Since(start).Round(time.Second), detected, count-detected, 0)
	if detected == 0 {
		t.Error("nothing was detected")
	}
}
