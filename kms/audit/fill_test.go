package audit

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/tlog"
)

// bound is the leaf that a command has.
func bound(i uint64) []byte {
	sum := sha256.Sum256(raw(i))
	return canon.Marshal(state.Leaf{Index: i, Command: sum[:]})
}

func appendBound(t *testing.T, l *ClusterLog, from, to uint64) {
	t.Helper()
	for i := from; i <= to; i++ {
		if err := l.Append(i, raw(i), bound(i)); err != nil {
			t.Fatal(err)
		}
	}
}

func mustRoot(t *testing.T, s tlog.Source, n uint64) []byte {
	t.Helper()
	root, err := tlog.Root(s, n)
	if err != nil {
		t.Fatal(err)
	}
	return root
}

// gappy has what a node has that twice took over a snapshot: the commands 1 to 300,
// 601 to 700, and 1001 to last of those that whole has all.
func gappy(t *testing.T, dir string, whole *ClusterLog, last uint64) *ClusterLog {
	t.Helper()
	l := mustOpenCluster(t, dir, Options{SegmentSize: 20_000})
	appendBound(t, l, 1, 300)
	for _, s := range []struct{ to, next uint64 }{{600, 700}, {1000, last}} {
		if err := l.Restored(s.to, s.to, mustRoot(t, whole, s.to)); err != nil {
			t.Fatal(err)
		}
		appendBound(t, l, s.to+1, s.next)
	}
	return l
}

// fetch fills from another node until n calls were made or nothing is missing.
func fetch(t *testing.T, l, other *ClusterLog, n int) {
	t.Helper()
	for range n {
		from, missing := l.Missing()
		if missing == 0 {
			return
		}
		b, err := other.Pack(from)
		if err != nil {
			t.Fatal(err)
		}
		records, err := Unpack(b)
		if err != nil {
			t.Fatal(err)
		}
		if len(records) > 100 { // many small steps
			records = records[:100]
		}
		if err := l.Fill(from, records); err != nil {
			t.Fatal(err)
		}
	}
}

func boundLeaves(n uint64) (leaves [][]byte) {
	for i := uint64(1); i <= n; i++ {
		leaves = append(leaves, bound(i))
	}
	return leaves
}

// TestFill fills two gaps, stopped and opened again on the way, while the log grows.
func TestFill(t *testing.T) {
	tmp := t.TempDir()
	whole := mustOpenCluster(t, filepath.Join(tmp, "whole"), Options{SegmentSize: 20_000})
	appendBound(t, whole, 1, 1500)
	dir := filepath.Join(tmp, "gappy")
	l := gappy(t, dir, whole, 1400)
	for _, n := range []int{2, 2, 1} {
		fetch(t, l, whole, n)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		l = mustOpenCluster(t, dir, Options{SegmentSize: 20_000})
	}
	if from, n := l.Missing(); from != 900 || n != 100 {
		t.Fatalf("%d leaves from %d on are missing", n, from)
	}
	if _, ok := l.Root(); ok {
		t.Error("a log with a gap has a root")
	}
	if got := mustRoot(t, l, 700); !bytes.Equal(got, mustRoot(t, whole, 700)) {
		t.Error("another root of what is there")
	}
	if _, err := l.Hashes(0, 700, 1); !errors.Is(err, kms.Unavailable) {
		t.Errorf("hashes in a gap: %v", err)
	}
	if _, err := l.Pack(950); !errors.Is(err, kms.Unavailable) {
		t.Errorf("records in a gap: %v", err)
	}
	fetch(t, l, whole, 9)
	appendBound(t, l, 1401, 1500)
	root, ok := l.Root()
	if want, _ := whole.Root(); !ok || !bytes.Equal(root, want) {
		t.Fatalf("root %x, want %x", root, want)
	}
	provable(t, l, boundLeaves(1500))
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = mustOpenCluster(t, dir, Options{SegmentSize: 20_000})
	provable(t, l, boundLeaves(1500))
	if _, n := l.Missing(); n != 0 {
		t.Errorf("%d leaves are missing", n)
	}
}

// TestFillRefuses has nodes that send other records than those of the log.
func TestFillRefuses(t *testing.T) {
	tmp := t.TempDir()
	whole := mustOpenCluster(t, filepath.Join(tmp, "whole"), Options{})
	appendBound(t, whole, 1, 1400)
	l := gappy(t, filepath.Join(tmp, "gappy"), whole, 1400)
	good := func(i uint64) Record { return Record{i, raw(i), bound(i)} }
	swapped, other := good(301), good(301)
	swapped.Raw = raw(302)
	other.Index = 302
	for name, r := range map[string]Record{
		"another command for the leaf": swapped, "another index": other, "one that is there": good(300), "one beyond the gap": good(601),
		"no leaf": {Index: 301, Raw: raw(301), Leaf: []byte("x")},
	} {
		if err := l.Fill(300, []Record{r}); !errors.Is(err, kms.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := l.Fill(301, []Record{good(302)}); !errors.Is(err, kms.Invalid) {
		t.Errorf("not the next: %v", err)
	}
	// A history of its own, each record in order.
	var forged []Record
	for i := uint64(301); i <= 600; i++ {
		r := good(i)
		if i == 450 {
			sum := sha256.Sum256([]byte("forged"))
			r = Record{i, []byte("forged"), canon.Marshal(state.Leaf{Index: i, Command: sum[:]})}
		}
		forged = append(forged, r)
	}
	if err := l.Fill(300, forged); !errors.Is(err, kms.Invalid) {
		t.Errorf("another history: %v", err)
	}
	if from, n := l.Missing(); from != 300 || n != 300 {
		t.Errorf("after a forged history %d leaves from %d on are missing", n, from)
	}
	fetch(t, l, whole, 99)
	provable(t, l, boundLeaves(1400))
}

// TestFilledIsVerifiedAgain damages what was fetched, while the node is down.
func TestFilledIsVerifiedAgain(t *testing.T) {
	tmp := t.TempDir()
	whole := mustOpenCluster(t, filepath.Join(tmp, "whole"), Options{})
	appendBound(t, whole, 1, 1400)
	dir := filepath.Join(tmp, "gappy")
	l := gappy(t, dir, whole, 1400)
	fetch(t, l, whole, 99)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if err := flip(filepath.Join(fillDir(dir, 700), clusterKind.name(0)), 5000); err != nil {
		t.Fatal(err)
	}
	l = mustOpenCluster(t, dir, Options{})
	if _, ok := l.Root(); ok {
		t.Error("a damaged record was taken")
	}
	fetch(t, l, whole, 99)
	provable(t, l, boundLeaves(1400))
	// A gap of an earlier release has no root: nothing could be verified.
	old := mustOpenCluster(t, filepath.Join(tmp, "old"), Options{})
	old.skip(Gap{From: 1, To: 10, Size: 10})
	if _, n := old.Missing(); n != 0 {
		t.Error("a gap without a root is to be filled")
	}
	if _, err := os.Stat(fillDir(old.writer.dir, 0)); err == nil {
		t.Error("a directory was made for it")
	}
}

func FuzzUnpack(f *testing.F) {
	f.Add(canon.Marshal([]packed{{1, raw(1), leaf(1)}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		records, err := Unpack(b)
		if err != nil {
			return
		}
		var all []packed
		for _, r := range records {
			all = append(all, packed(r))
		}
		if again := canon.Marshal(all); len(all) > 0 && !bytes.Equal(again, b) {
			t.Errorf("%x was read as %x", b, again)
		}
	})
}
