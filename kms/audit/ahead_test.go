package audit

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/conclave-kms/conclave/kms"
)

// image copies the segments of a log as they are, as a crash would leave them.
func image(t *testing.T, dir string) string {
	t.Helper()
	to := t.TempDir()
	if err := os.Chmod(to, 0o700); err != nil {
		t.Fatal(err)
	}
	names, err := accessKind.segments(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err == nil {
			err = os.WriteFile(filepath.Join(to, name), b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return to
}

// writtenLog makes a log of one segment from batches of entries; ends are the
// offsets at which they end.
func writtenLog(t *testing.T, batches ...[]Entry) (path string, b []byte, ends []int) {
	t.Helper()
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	b = accessKind.encode(header{})
	for _, entries := range batches {
		batch := len(b)
		for _, e := range entries {
			b = appendFrame(b, e.Marshal(), batch)
		}
		ends = append(ends, len(b))
	}
	return filepath.Join(dir, accessKind.name(0)), b, ends
}

func entries(from, to int) []Entry {
	var all []Entry
	for i := from; i < to; i++ {
		all = append(all, entry(i))
	}
	return all
}

// recovers writes a segment and opens the log. It returns what was removed.
func recovers(t *testing.T, path string, b []byte, size uint64) string {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	n := uint64(0)
	if err := Read(filepath.Dir(path), func(uint64, Entry) error { n++; return nil }); err != nil || n != size {
		t.Fatalf("Read: %d entries, want %d: %v", n, size, err)
	}
	l, err := Open(filepath.Dir(path), Options{})
	if err != nil {
		t.Fatal(err)
	}
	if l.Size() != size {
		t.Errorf("Open: %d entries, want %d", l.Size(), size)
	}
	fill(t, l, 0, 1)
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	return l.Recovered()
}

func refuses(t *testing.T, path string, b []byte, offset int) {
	t.Helper()
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	l, err := Open(filepath.Dir(path), Options{})
	if err == nil {
		l.Close()
	}
	for _, err := range []error{err, Read(filepath.Dir(path), func(uint64, Entry) error { return nil })} {
		if !errors.Is(err, kms.Invalid) || !strings.Contains(err.Error(), fmt.Sprintf("%s at offset %d:", path, offset)) {
			t.Fatalf("want damage at %d: %v", offset, err)
		}
	}
}

func TestZerosAheadAreNoRecords(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, Options{})
	fill(t, l, 0, 5)
	path, b := lastSegment(t, dir)
	records := len(bytes.TrimRight(b, "\x00"))
	if int64(len(b)-records) < accessKind.ahead-4*500 {
		t.Fatalf("%d bytes written ahead", len(b)-records)
	}
	for range 2 { // the crash, and the node that stops before it writes
		dir := image(t, dir)
		got, err := ReadLeaves(dir, func(uint64, []byte) error { return nil })
		if err != nil || got.Size != 5 || !bytes.Equal(got.Root, l.Root()) {
			t.Fatalf("read %d leaves: %v", got.Size, err)
		}
		again := mustOpen(t, dir, Options{})
		if again.Recovered() != "" || again.Size() != 5 {
			t.Errorf("size %d, recovered %q", again.Size(), again.Recovered())
		}
		fill(t, again, 5, 8)
		if err := again.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(path); !bytes.Equal(got, b[:records]) {
		t.Errorf("after Close the segment has %d bytes, its records %d", len(got), records)
	}
}

func TestZerosEndWithTheSegment(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, Options{SegmentSize: 1500})
	fill(t, l, 0, 20)
	names, err := accessKind.segments(dir)
	if err != nil || len(names) < 4 {
		t.Fatalf("%d segments, %v", len(names), err)
	}
	for i, name := range names {
		b, _ := os.ReadFile(filepath.Join(dir, name))
		if full := i < len(names)-1; len(b) > 1500 || full && b[len(b)-1] == 0 {
			t.Errorf("%s has %d bytes, the last one %x", name, len(b), b[len(b)-1])
		}
	}
	dir = image(t, dir)
	first := filepath.Join(dir, names[0])
	b, _ := os.ReadFile(first)
	refuses(t, first, append(b, make([]byte, 4096)...), len(b))
}

func TestTornRecordBeforeZeros(t *testing.T) {
	path, b, ends := writtenLog(t, entries(0, 3), entries(3, 4))
	for at := ends[0] + 1; at < ends[1]; at += 5 {
		image := append(bytes.Clone(b[:at]), make([]byte, 1<<16)...)
		if got := recovers(t, path, image, 3); !strings.Contains(got, fmt.Sprintf("%s at offset %d:", path, ends[0])) {
			t.Fatalf("cut at %d: recovered %q", at, got)
		}
	}
}

// A disk that overwrites zeros may keep any of the sectors of a write that was
// not synced.
func TestLostSectors(t *testing.T) {
	path, b, ends := writtenLog(t, entries(0, 6), entries(6, 12), entries(12, 22))
	image := append(bytes.Clone(b), make([]byte, 1<<16)...)
	record := (ends[0] - headerSize) / 6
	lost := 0
	for from := sector; from < len(b); from += sector {
		holed := bytes.Clone(image)
		clear(holed[max(from, headerSize):min(from+sector, len(b))])
		hit := headerSize + (from-headerSize)/record*record // the record that lost its bytes
		if from >= ends[1] {
			lost++
			if got := recovers(t, path, holed, uint64((hit-headerSize)/record)); got == "" {
				t.Error("a lost sector is not reported")
			}
			continue
		}
		refuses(t, path, holed, hit)
	}
	if lost < 3 {
		t.Fatalf("%d sectors in the last batch", lost)
	}
	// Every second sector of the last batch, its first included.
	holed := bytes.Clone(image)
	from := (ends[1]/sector + 1) * sector
	clear(holed[ends[1]:from])
	for at := from + sector; at < len(b); at += 2 * sector {
		clear(holed[at : at+sector])
	}
	if got := recovers(t, path, holed, 12); !strings.Contains(got, fmt.Sprintf("offset %d:", ends[1])) {
		t.Errorf("recovered %q", got)
	}
	// Damage in the last batch that no lost sector explains.
	for i := ends[1]; i < len(b); i += 3 {
		bad := bytes.Clone(image)
		bad[i] ^= 0x10
		refuses(t, path, bad, ends[1]+(i-ends[1])/record*record)
	}
}

func TestGarbageAfterZerosIsRefused(t *testing.T) {
	path, b, ends := writtenLog(t, entries(0, 3), entries(3, 6))
	zeros := make([]byte, 1<<16)
	_, other, _ := writtenLog(t, entries(3, 5))
	for name, tail := range map[string][]byte{
		"a byte at once":   append(zeros[:64:64], 1),
		"a byte far away":  append(zeros[:50_000:50_000], 1),
		"text":             append(zeros[:8192:8192], strings.Repeat("garbage ", 1000)...),
		"another batch":    append(zeros[:4096:4096], other[headerSize:]...),
		"zeros after that": append(append(zeros[:4096:4096], "garbage"...), zeros...),
	} {
		t.Run(name, func(t *testing.T) { refuses(t, path, append(bytes.Clone(b), tail...), ends[1]) })
	}
	// A lost sector in the last batch does not excuse what follows the batch.
	holed := append(append(bytes.Clone(b), zeros...), "garbage"...)
	clear(holed[ends[0] : (ends[0]/sector+1)*sector])
	refuses(t, path, holed, ends[0])
}

func TestNoSpaceForZeros(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	d := &faultyDisk{}
	full := error(syscall.ENOSPC)
	d.onZeros.Store(&full)
	l := mustOpen(t, dir, Options{disk: d})
	fill(t, l, 0, 3)
	if got := image(t, dir); l.Failure() != nil {
		t.Fatal(l.Failure())
	} else if again := mustOpen(t, got, Options{}); again.Size() != 3 || again.Recovered() != "" {
		t.Errorf("%d entries, recovered %q", again.Size(), again.Recovered())
	}
	for i := 3; i < 400; i++ { // beyond the zeros that were written
		fill(t, l, i, i+1)
	}
	d.onWrite.Store(&full)
	if err := l.Append(t.Context(), entry(400)); !errors.Is(err, kms.ReadOnly) || !errors.Is(err, full) {
		t.Errorf("no space for the entry: %v", err)
	}
	if err := l.Close(); !errors.Is(err, kms.ReadOnly) {
		t.Error(err)
	}
	l = mustOpen(t, dir, Options{})
	if l.Size() != 400 {
		t.Errorf("%d entries", l.Size())
	}
}

func TestReadBesideTheWriter(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, Options{SegmentSize: 40_000})
	fill(t, l, 0, 1)
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			for i := range 60 {
				if err := l.Append(t.Context(), entry(g*100+i)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for l.Size() < 16*60+1 && !t.Failed() {
		before := l.Size()
		got, err := ReadLeaves(dir, func(uint64, []byte) error { return nil })
		if err != nil || got.Size < before {
			t.Errorf("read %d leaves of at least %d: %v", got.Size, before, err)
			break
		}
	}
	wg.Wait()
}
