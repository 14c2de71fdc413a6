package audit

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

func mustOpenCluster(t testing.TB, dir string, o Options) *ClusterLog {
	t.Helper()
	l, err := openClusterLog(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func raw(i uint64) []byte  { return []byte(fmt.Sprintf("command %d", i)) }
func leaf(i uint64) []byte { return []byte(fmt.Sprintf("leaf %d", i)) }

func appendAll(t testing.TB, l *ClusterLog, indexes ...uint64) {
	t.Helper()
	for _, i := range indexes {
		if err := l.Append(i, raw(i), leaf(i)); err != nil {
			t.Fatal(err)
		}
	}
}

// held reads back the indexes and gaps, checking the contents.
func held(t *testing.T, dir string) (indexes []uint64, gaps []Gap) {
	t.Helper()
	err := ReadCluster(dir, func(r Record) error {
		if !bytes.Equal(r.Raw, raw(r.Index)) || !bytes.Equal(r.Leaf, leaf(r.Index)) {
			return fmt.Errorf("record %d differs", r.Index)
		}
		indexes = append(indexes, r.Index)
		return nil
	}, func(g Gap) error { gaps = append(gaps, g); return nil })
	if err != nil {
		t.Fatal(err)
	}
	return indexes, gaps
}

func TestClusterLog(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpenCluster(t, dir, Options{SegmentSize: 300})
	// Raft's own entries take the indexes 1, 4 and 5.
	appendAll(t, l, 2, 3, 6, 7)
	appendAll(t, l, 2, 7, 8) // again after a restart
	root, ok := l.Root()
	if want := dumbRoot([][]byte{leaf(2), leaf(3), leaf(6), leaf(7), leaf(8)}); !ok || !bytes.Equal(root, want) {
		t.Errorf("root %x, want %x", root, want)
	}
	if err := l.Restored(8, 5, root); err != nil || len(l.Gaps()) != 0 {
		t.Errorf("a snapshot of what is there: %v, %v", err, l.Gaps())
	}
	if err := l.Restored(20, 4, root); !errors.Is(err, kms.Invalid) {
		t.Errorf("a snapshot of another history: %v", err)
	}
	if err := l.Restored(20, 11, root); err != nil {
		t.Fatal(err)
	}
	appendAll(t, l, 20, 21, 22)
	want := []Gap{{From: 9, To: 20, Size: 11, Root: [32]byte(root)}}
	check := func(l *ClusterLog) {
		t.Helper()
		if _, ok := l.Root(); ok || l.Size() != 13 || l.Last() != 22 || !reflect.DeepEqual(l.Gaps(), want) {
			t.Errorf("size %d last %d gaps %v", l.Size(), l.Last(), l.Gaps())
		}
	}
	check(l)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := l.Append(23, raw(23), leaf(23)); !errors.Is(err, kms.Unavailable) {
		t.Errorf("after Close: %v", err)
	}
	if names, _ := clusterKind.segments(dir); len(names) < 2 {
		t.Errorf("%d segments; want rotation", len(names))
	}
	indexes, gaps := held(t, dir)
	if !slices.Equal(indexes, []uint64{2, 3, 6, 7, 8, 21, 22}) || !reflect.DeepEqual(gaps, want) {
		t.Errorf("held %v, gaps %v", indexes, gaps)
	}
	l = mustOpenCluster(t, dir, Options{SegmentSize: 300})
	check(l)
	appendAll(t, l, 23)
}

func TestClusterLogRefuses(t *testing.T) {
	l := mustOpenCluster(t, filepath.Join(t.TempDir(), "log"), Options{})
	for name, err := range map[string]error{
		"no command": l.Append(1, nil, leaf(1)),
		"no leaf":    l.Append(1, raw(1), nil),
		"too long":   l.Append(1, make([]byte, maxRecord), leaf(1)),
	} {
		if !errors.Is(err, kms.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if l.Size() != 0 || l.Last() != 0 {
		t.Error("a refused record counts")
	}
}

// TestClusterLogFollowsState checks that size and root are the state machine's.
func TestClusterLogFollowsState(t *testing.T) {
	l := mustOpenCluster(t, filepath.Join(t.TempDir(), "log"), Options{})
	w := statetest.New(t, statetest.Options{})
	for range 3 {
		for _, n := range w.NodeIDs() {
			cmd := w.Command(n, state.Tick{})
			r := w.Apply(cmd)
			if err := l.Append(r.Index, cmd, r.Leaf); err != nil {
				t.Fatal(err)
			}
		}
		root, ok := l.Root()
		if s := w.State(); !ok || l.Size() != s.LogSize() || !bytes.Equal(root, s.LogRoot()) {
			t.Fatalf("size %d, the state says %d", l.Size(), s.LogSize())
		}
	}
}

func TestClusterLogTornTail(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpenCluster(t, dir, Options{})
	appendAll(t, l, 1, 2, 3)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, clusterKind.name(0))
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for cut := 1; cut < 30; cut++ {
		if err := os.WriteFile(path, whole[:len(whole)-cut], 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := OpenClusterLog(dir)
		if err != nil {
			t.Fatal(err)
		}
		if l.Size() != 2 || !strings.Contains(l.Recovered(), path) {
			t.Errorf("cut %d: size %d, %q", cut, l.Size(), l.Recovered())
		}
		appendAll(t, l, 1, 2, 3)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if got, _ := os.ReadFile(path); !bytes.Equal(got, whole) {
			t.Fatalf("cut %d: not the same log again", cut)
		}
	}
	for i := range whole {
		bad := bytes.Clone(whole)
		bad[i] ^= 0x10
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		if l, err := OpenClusterLog(dir); !errors.Is(err, kms.Invalid) || !strings.Contains(err.Error(), path) {
			t.Fatalf("byte %d changed: %v %v", i, l, err)
		}
	}
}

func TestClusterLogRefusesDisorder(t *testing.T) {
	frames := func(payloads ...[]byte) []byte {
		b := clusterKind.encode(header{})
		for _, p := range payloads {
			b = appendFrame(b, p, len(b))
		}
		return b
	}
	command := func(index byte) []byte {
		return append([]byte{recordCommand, 0, 0, 0, 0, 0, 0, 0, index, 0, 0, 0, 1}, "rl"...)
	}
	gap := func(from, to, size byte) []byte {
		b := make([]byte, 25)
		b[0], b[8], b[16], b[24] = recordGap, from, to, size
		return b
	}
	for name, b := range map[string][]byte{
		"an index twice":           frames(command(3), command(3)),
		"descending indexes":       frames(command(3), command(2)),
		"index 0":                  frames(command(0)),
		"a gap inside":             frames(command(3), gap(2, 9, 9)),
		"a gap of nothing":         frames(command(3), gap(4, 3, 9)),
		"a gap without leaves":     frames(command(3), gap(4, 9, 1)),
		"a command before the gap": frames(gap(1, 9, 9), command(9)),
		"an unknown kind":          frames([]byte{3, 0}),
		"no leaf":                  frames(command(3)[:14]),
		"a root":                   clusterKind.encode(header{root: [32]byte{1}}),
	} {
		dir := t.TempDir()
		if err := errors.Join(os.Chmod(dir, 0o700), os.WriteFile(filepath.Join(dir, clusterKind.name(0)), b, 0o600)); err != nil {
			t.Fatal(err)
		}
		if _, err := OpenClusterLog(dir); !errors.Is(err, kms.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestClusterLogWriteErrors(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	d := &faultyDisk{}
	l := mustOpenCluster(t, dir, Options{disk: d})
	appendAll(t, l, 1)
	cause := error(syscall.ENOSPC)
	d.onWrite.Store(&cause)
	for range 2 {
		if err := l.Append(2, raw(2), leaf(2)); !errors.Is(err, kms.ReadOnly) || !errors.Is(err, cause) {
			t.Fatal(err)
		}
		d.onWrite.Store(nil)
	}
	if l.Size() != 1 || !errors.Is(l.Sync(), kms.ReadOnly) || !errors.Is(l.Close(), kms.ReadOnly) {
		t.Error("the failure is forgotten")
	}
	l = mustOpenCluster(t, dir, Options{disk: &faultyDisk{}})
	appendAll(t, l, 1, 2)
	if indexes, _ := held(t, dir); !slices.Equal(indexes, []uint64{1, 2}) {
		t.Error(indexes)
	}
}

func TestClusterLogConcurrently(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpenCluster(t, dir, Options{SegmentSize: 2000})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range uint64(200) {
			appendAll(t, l, i+1)
		}
	})
	for range 4 {
		wg.Go(func() {
			for range 20 {
				l.Root()
				l.Size()
				l.Gaps()
				if err := l.Sync(); err != nil {
					t.Error(err)
				}
				held(t, dir)
			}
		})
	}
	wg.Wait()
	if l.Size() != 200 {
		t.Error(l.Size())
	}
}
