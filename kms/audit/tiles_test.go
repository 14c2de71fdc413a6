package audit

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/tlog"
)

var (
	_ tlog.Source = (*Log)(nil)
	_ tlog.Source = (*ClusterLog)(nil)
)

// provable checks roots, proofs and leaves of many sizes against the leaves.
func provable(t *testing.T, s tlog.Source, leaves [][]byte) {
	t.Helper()
	if s.Size() != uint64(len(leaves)) {
		t.Fatalf("%d leaves, want %d", s.Size(), len(leaves))
	}
	hashes := make([][]byte, len(leaves))
	m := newMerkle(nil)
	var sizes []uint64
	roots := map[uint64][]byte{0: m.tree().Root}
	for i, leaf := range leaves {
		hashes[i] = LeafHash(leaf)
		m.append(hashes[i])
		if n := uint64(i + 1); n%97 == 0 || n%256 < 2 || i+1 == len(leaves) {
			sizes = append(sizes, n)
			roots[n] = m.tree().Root
		}
	}
	for i, n := range sizes {
		root, err := tlog.Root(s, n)
		if err != nil || !bytes.Equal(root, roots[n]) {
			t.Fatalf("the root of %d leaves is %x, want %x: %v", n, root, roots[n], err)
		}
		leaf := n * 2 / 3
		p, err := tlog.Inclusion(s, leaf, n)
		if err := errors.Join(err, tlog.VerifyInclusion(leaf, n, hashes[leaf], p, root)); err != nil {
			t.Fatalf("leaf %d of %d: %v", leaf, n, err)
		}
		q, err := tlog.Consistency(s, sizes[i/2], n)
		if err := errors.Join(err, tlog.VerifyConsistency(sizes[i/2], n, q, roots[sizes[i/2]], root)); err != nil {
			t.Fatalf("%d of %d leaves: %v", sizes[i/2], n, err)
		}
		got, err := s.Leaves(leaf, int(n-leaf))
		if err != nil || !slices.EqualFunc(got, leaves[leaf:n], bytes.Equal) {
			t.Fatalf("leaves %d to %d: %v", leaf, n, err)
		}
	}
	_, a := s.Leaves(uint64(len(leaves)), 1)
	_, b := s.Hashes(0, 1, uint64(len(leaves)))
	_, c := s.Hashes(9, 0, 1)
	for _, err := range []error{a, b, c} {
		if !errors.Is(err, kms.Invalid) {
			t.Errorf("beyond the end: %v", err)
		}
	}
}

// appendMany appends with many callers at once, in any order.
func appendMany(t *testing.T, l *Log, n int) {
	t.Helper()
	var wg sync.WaitGroup
	for k := range 16 {
		wg.Go(func() {
			for i := k; i < n; i += 16 {
				if err := l.Append(t.Context(), entry(i)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func readAll(t *testing.T, dir string) [][]byte {
	t.Helper()
	var leaves [][]byte
	if _, err := ReadLeaves(dir, func(_ uint64, leaf []byte) error { leaves = append(leaves, slices.Clone(leaf)); return nil }); err != nil {
		t.Fatal(err)
	}
	return leaves
}

// TestAccessProofs makes proofs from a log that grows, rotates, and is opened
// again with its tiles whole, damaged, too long, of another log, and gone.
func TestAccessProofs(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	o := Options{SegmentSize: 50_000}
	level := filepath.Join(dir, tilesDir, "0")
	want := 0
	for _, c := range []struct {
		name   string
		damage func() error
	}{
		{"whole", func() error { return nil }},
		{"gone", func() error { return os.RemoveAll(filepath.Join(dir, tilesDir)) }},
		{"cut", func() error { return os.Truncate(level, tileSize+100) }},
		{"too long", func() error { return os.WriteFile(level, make([]byte, 20*tileSize), 0o600) }},
		{"a bit", func() error { return flip(level, 33) }},
		{"last level", func() error { return os.WriteFile(filepath.Join(dir, tilesDir, "1"), make([]byte, 5*tileSize), 0o600) }},
	} {
		l := mustOpen(t, dir, o)
		appendMany(t, l, 300)
		want += 300
		provable(t, l, readAll(t, dir))
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := l.Hashes(0, 0, 1); !errors.Is(err, kms.Unavailable) {
			t.Errorf("a closed log gave hashes: %v", err)
		}
		if fi, err := os.Stat(level); err != nil || fi.Size() < int64(want/256*tileSize) {
			t.Errorf("the file of tiles is not complete: %v", err)
		}
		if err := c.damage(); err != nil {
			t.Fatal(err)
		}
		l = mustOpen(t, dir, o)
		leaves := readAll(t, dir)
		if len(leaves) != want {
			t.Fatalf("%d leaves, want %d", len(leaves), want)
		}
		t.Run(c.name, func(t *testing.T) { provable(t, l, leaves) })
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func flip(path string, at int64) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	b[at] ^= 1
	return os.WriteFile(path, b, 0o600)
}

// TestTilesThatCannotBeWritten hold up nothing.
func TestTilesThatCannotBeWritten(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, tilesDir), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	l := mustOpen(t, dir, Options{})
	appendMany(t, l, 300)
	l.tiles.write()
	if _, err := l.Hashes(0, 0, 1); !errors.Is(err, kms.Unavailable) {
		t.Errorf("hashes: %v", err)
	}
	appendMany(t, l, 300)
	if got := l.Size(); got != 600 || l.Failure() != nil {
		t.Errorf("%d entries, %v", got, l.Failure())
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, tilesDir)); err != nil {
		t.Fatal(err)
	}
	provable(t, mustOpen(t, dir, Options{}), readAll(t, dir))
}

// TestMoreTilesThanWait opens a log whose tiles are missing and too many for memory.
func TestMoreTilesThanWait(t *testing.T) {
	ts := newTiles(filepath.Join(t.TempDir()))
	defer ts.close()
	m := newMerkle(ts)
	leaf := LeafHash([]byte("leaf"))
	for range (maxWaiting/16 + 9) * tlog.TileWidth {
		m.append(leaf)
		ts.relieve()
	}
	if ts.failed != nil || ts.waiting >= maxWaiting/16 {
		t.Errorf("%d tiles wait, %v", ts.waiting, ts.failed)
	}
}

func TestClusterProofs(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	o := Options{SegmentSize: 3000}
	l := mustOpenCluster(t, dir, o)
	var leaves [][]byte
	grow := func(n uint64) {
		for range n {
			i := l.Last() + 2 // Raft's own entries take indexes
			appendAll(t, l, i)
			leaves = append(leaves, leaf(i))
		}
	}
	for range 3 {
		grow(200)
		provable(t, l, leaves)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		l = mustOpenCluster(t, dir, o)
		provable(t, l, leaves)
	}
	size := uint64(len(leaves))
	if err := l.Restored(l.Last()+50, size+10, make([]byte, 32)); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		grow(20)
		check := func(from uint64, n int, want [][]byte) {
			t.Helper()
			got, err := l.Leaves(from, n)
			if want == nil && !errors.Is(err, kms.Unavailable) || want != nil && !slices.EqualFunc(got, want, bytes.Equal) {
				t.Errorf("%d leaves from %d: %d, %v", n, from, len(got), err)
			}
		}
		check(size-1, 1, leaves[size-1:size])
		check(size-1, 2, nil)
		check(size, 1, nil)
		check(size+9, 1, nil)
		check(size+10, 20, leaves[size:size+20])
		if _, err := l.Hashes(0, size, 1); !errors.Is(err, kms.Unavailable) {
			t.Errorf("hashes after a gap: %v", err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		l = mustOpenCluster(t, dir, o)
	}
}
