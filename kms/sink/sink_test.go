package sink

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/conclave-kms/conclave/kms/audit"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var quiet = slog.New(slog.DiscardHandler)

func entry(i int) audit.Entry {
	return audit.Entry{Time: 1767225600123 + int64(i), Node: "fr-1", Principal: "spiffe://fr.example/service/planner", Action: "encrypt", Resource: "coalition/orders",
		Version: 3, Request: "r-1", Outcome: "ok", Context: map[string]string{"table": "orders", "row": "\"4711\"\n"}, Count: i}
}

// gate is a sink that takes entries when it is let, as often as it is let.
type gate struct {
	let chan error
	mu  sync.Mutex
	got []int
}

func (g *gate) write(ctx context.Context, entries []audit.Entry) (int, error) {
	select {
	case err := <-g.let:
		if err != nil {
			return 0, err
		}
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, e := range entries {
		g.got = append(g.got, e.Count)
	}
	return 0, nil
}

func (g *gate) close() error { return nil }

// TestQueueNeverBlocks puts more than a sink takes that hangs.
func TestQueueNeverBlocks(t *testing.T) {
	g := &gate{let: make(chan error)}
	q := start("gate", g, quiet, 10, time.Millisecond)
	for i := range 1000 {
		q.Put(entry(i))
	}
	if d := q.Dropped(); d < 1000-10-batchLength || d > 1000-10 {
		t.Errorf("%d of 1000 were dropped", d)
	}
	close(g.let)
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	if q.Sent()+q.Dropped() != 1000 || int(q.Sent()) != len(g.got) || !slices.IsSorted(g.got) {
		t.Errorf("%d sent, %d dropped, %d arrived", q.Sent(), q.Dropped(), len(g.got))
	}
	q.Put(entry(0))
	if q.Sent()+q.Dropped() != 1001 || q.Close() != nil {
		t.Error("a closed queue does not count what it drops")
	}
}

func TestQueueTriesAgain(t *testing.T) {
	g := &gate{let: make(chan error)}
	q := start("gate", g, quiet, 10, time.Millisecond)
	q.Put(entry(1))
	g.let <- errors.New("not now")
	g.let <- errors.New("not now")
	g.let <- nil
	q.Put(entry(2))
	g.let <- errors.Join(errRefused, errors.New("never"))
	close(g.let)
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(g.got, []int{1}) || q.Sent() != 1 || q.Dropped() != 1 {
		t.Errorf("arrived %v, %d sent, %d dropped", g.got, q.Sent(), q.Dropped())
	}
}

// memory is an access log that may fail.
type memory struct {
	err error
	n   int
}

func (m *memory) Append(context.Context, audit.Entry) error { m.n++; return m.err }

func TestCopied(t *testing.T) {
	g := &gate{let: make(chan error)}
	close(g.let)
	q := start("gate", g, quiet, 10, time.Millisecond)
	m := &memory{err: errors.New("the disk is full")}
	c := Copied{Log: m, Sinks: []*Queue{q}}
	if err := c.Append(t.Context(), entry(1)); !errors.Is(err, m.err) {
		t.Errorf("%v", err)
	}
	m.err = nil
	if err := errors.Join(c.Append(t.Context(), entry(2)), q.Close()); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(g.got, []int{2}) || m.n != 2 {
		t.Errorf("copies %v of %d entries: only what is durable may be copied", g.got, m.n)
	}
}

func TestFile(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "access.jsonl")
	lines := func(path string) (n []int) {
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(b)) {
			var e audit.Entry
			if err := json.Unmarshal([]byte(line), &e); err != nil || e.Context["row"] != entry(0).Context["row"] {
				t.Fatalf("%q: %v", line, err)
			}
			n = append(n, e.Count)
		}
		return n
	}
	w := &file{path: path}
	defer w.close()
	for i := range 4 {
		if _, err := w.write(t.Context(), []audit.Entry{entry(2 * i), entry(2*i + 1)}); err != nil {
			t.Fatal(err)
		}
		if i == 1 { // as logrotate does
			if err := os.Rename(path, path+".1"); err != nil {
				t.Fatal(err)
			}
		}
	}
	if a, b := lines(path+".1"), lines(path); !slices.Equal(a, []int{0, 1, 2, 3}) || !slices.Equal(b, []int{4, 5, 6, 7}) {
		t.Errorf("lines %v, then %v", a, b)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	if _, err := File(filepath.Join(dir, "missing", "x"), quiet); err == nil {
		t.Error("a file in a directory that is not there")
	}
	q, err := File(path, quiet)
	if err != nil {
		t.Fatal(err)
	}
	q.Put(entry(8))
	if err := q.Close(); err != nil || q.Sent() != 1 || q.Name() != "file" {
		t.Errorf("%d sent, %v", q.Sent(), err)
	}
}

func TestTo(t *testing.T) {
	var got []int
	q := To("here", func(_ context.Context, entries []audit.Entry) {
		for _, e := range entries {
			got = append(got, e.Count)
		}
	}, quiet)
	for i := range 5 {
		q.Put(entry(i))
	}
	if err := q.Close(); err != nil || !slices.Equal(got, []int{0, 1, 2, 3, 4}) || q.Sent() != 5 || q.Name() != "here" {
		t.Errorf("%v, %d sent, %v", got, q.Sent(), err)
	}
}
