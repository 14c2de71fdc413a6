package audit

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// TestReadSince reads the end of a log of several segments, of which old ones are not even
// opened.
func TestReadSince(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, Options{SegmentSize: 4096})
	const n = 100
	fill(t, l, 0, n)
	names, err := accessKind.segments(dir)
	if err != nil || len(names) < 4 {
		t.Fatal(names, err)
	}
	at := func(i int) time.Time { return time.UnixMilli(entry(i).Time) }
	read := func(since time.Time) (got []Entry, reaches bool) {
		t.Helper()
		reaches, err := ReadSince(dir, since, func(e Entry) { got = append(got, e) })
		if err != nil {
			t.Fatal(err)
		}
		return got, reaches
	}
	for _, i := range []int{0, 1, n / 2, n - 1, n} {
		got, reaches := read(at(i))
		if len(got) != n-i || reaches != (i > 0) || len(got) > 0 && got[0].Request != entry(i).Request {
			t.Errorf("since entry %d: %d entries, reaches back: %t", i, len(got), reaches)
		}
	}
	// A segment that was not written to since then stays closed, whatever is in it.
	old := filepath.Join(dir, names[0])
	if err := os.Chtimes(old, time.Time{}, at(0)); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(old, os.O_WRONLY, 0)
	if err == nil {
		_, err = f.WriteAt([]byte("damaged"), int64(headerSize)+20)
		err = errors.Join(err, f.Close(), os.Chtimes(old, time.Time{}, at(0)))
	}
	if err != nil {
		t.Fatal(err)
	}
	if got, reaches := read(at(n - 1)); len(got) != 1 || !reaches {
		t.Errorf("%d entries, reaches back: %t", len(got), reaches)
	}
	if _, err := ReadSince(dir, at(0), func(Entry) {}); err == nil {
		t.Error("a damaged segment that is opened is not noticed")
	}
	if _, err := ReadSince(filepath.Join(dir, "none"), at(0), func(Entry) {}); !errors.Is(err, kms.Unavailable) {
		t.Errorf("no log: %v", err)
	}
}
