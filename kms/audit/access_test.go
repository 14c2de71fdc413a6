package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/transparency-dev/merkle/rfc6962"
	"go.uber.org/goleak"

	"github.com/conclave-kms/conclave/kms"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func entry(i int) Entry {
	return Entry{
		Time: 1767225600000 + int64(i), Node: "fr-node-1", Principal: "spiffe://fr.example/service/planner",
		Action: "encrypt", Resource: "coalition/orders", Version: 3, Request: fmt.Sprintf("req-%08d", i), Outcome: "ok",
		Context: map[string]string{"tenant": "alpha", "table": "orders"}, Count: 1,
	}
}

// dumbRoot is the recursive definition of RFC 6962, section 2.1.
func dumbRoot(leaves [][]byte) []byte {
	switch n := len(leaves); n {
	case 0:
		return rfc6962.DefaultHasher.EmptyRoot()
	case 1:
		return rfc6962.DefaultHasher.HashLeaf(leaves[0])
	default:
		k := 1
		for k*2 < n {
			k *= 2
		}
		return rfc6962.DefaultHasher.HashChildren(dumbRoot(leaves[:k]), dumbRoot(leaves[k:]))
	}
}

func mustOpen(t testing.TB, dir string, o Options) *Log {
	t.Helper()
	l, err := Open(dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func fill(t testing.TB, l *Log, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		if err := l.Append(context.Background(), entry(i)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestAppendReadRoundTrip(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, Options{SegmentSize: 1500})
	if !bytes.Equal(l.Root(), dumbRoot(nil)) {
		t.Error("an empty log has not the empty root")
	}
	var leaves [][]byte
	for i := range 40 {
		fill(t, l, i, i+1)
		leaves = append(leaves, entry(i).Marshal())
		if got := l.Tree(); got.Size != uint64(i+1) || !bytes.Equal(got.Root, dumbRoot(leaves)) {
			t.Fatalf("after %d entries the tree is %d %x", i+1, got.Size, got.Root)
		}
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if names, _ := accessKind.segments(dir); len(names) < 5 {
		t.Errorf("%d segments; want rotation", len(names))
	}
	next := 0
	err := Read(dir, func(seq uint64, e Entry) error {
		if seq != uint64(next) || !bytes.Equal(e.Marshal(), leaves[next]) {
			return fmt.Errorf("entry %d differs", seq)
		}
		next++
		return nil
	})
	if err != nil || next != 40 {
		t.Fatalf("read %d entries: %v", next, err)
	}
	l = mustOpen(t, dir, Options{SegmentSize: 1500})
	if l.Recovered() != "" {
		t.Error(l.Recovered())
	}
	fill(t, l, 40, 41)
	leaves = append(leaves, entry(40).Marshal())
	if !bytes.Equal(l.Root(), dumbRoot(leaves)) || l.Size() != 41 {
		t.Error("the log does not go on where it ended")
	}
	if _, err := Open(dir, Options{}); !errors.Is(err, kms.Unavailable) {
		t.Errorf("a second writer: %v", err)
	}
}

func TestAppendConcurrently(t *testing.T) {
	dir := t.TempDir()
	os.Chmod(dir, 0o700)
	l := mustOpen(t, dir, Options{SegmentSize: 20_000})
	var wg sync.WaitGroup
	for g := range 16 {
		wg.Go(func() {
			for i := range 50 {
				if err := l.Append(t.Context(), entry(g*1000+i)); err != nil {
					t.Error(err)
				}
				l.Tree()
			}
		})
	}
	wg.Wait()
	want := l.Tree()
	if want.Size != 800 {
		t.Fatalf("size %d", want.Size)
	}
	seen := map[string]bool{}
	got, err := ReadLeaves(dir, func(_ uint64, leaf []byte) error { seen[string(leaf)] = true; return nil })
	if err != nil || got.Size != 800 || !bytes.Equal(got.Root, want.Root) || len(seen) != 800 {
		t.Errorf("read beside the writer: %d leaves, %d different, %v", got.Size, len(seen), err)
	}
}

// lastSegment returns the path and contents of the last segment.
func lastSegment(t *testing.T, dir string) (string, []byte) {
	t.Helper()
	names, err := accessKind.segments(dir)
	if err != nil || len(names) == 0 {
		t.Fatalf("%d segments, %v", len(names), err)
	}
	path := filepath.Join(dir, names[len(names)-1])
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return path, b
}

func newFilled(t *testing.T, n int, segment int64) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "log")
	l := mustOpen(t, dir, Options{SegmentSize: segment})
	fill(t, l, 0, n)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestTornTailIsRemovedAtEveryLength(t *testing.T) {
	dir := newFilled(t, 3, 0)
	path, b := lastSegment(t, dir)
	record := len(entry(0).Marshal()) + frameSize
	for cut := 1; cut < record; cut += 7 {
		for _, zeros := range []int{0, cut, 5000} {
			torn := append(bytes.Clone(b[:len(b)-cut]), make([]byte, zeros)...)
			if err := os.WriteFile(path, torn, 0o600); err != nil {
				t.Fatal(err)
			}
			n := 0
			if err := Read(dir, func(uint64, Entry) error { n++; return nil }); err != nil || n != 2 {
				t.Fatalf("cut %d zeros %d: read %d, %v", cut, zeros, n, err)
			}
			l, err := Open(dir, Options{})
			if err != nil {
				t.Fatalf("cut %d zeros %d: %v", cut, zeros, err)
			}
			if !strings.Contains(l.Recovered(), path) || l.Size() != 2 {
				t.Errorf("cut %d: size %d, recovered %q", cut, l.Size(), l.Recovered())
			}
			fill(t, l, 2, 3)
			if l.Close() != nil {
				t.Error("close")
			}
			if _, got := lastSegment(t, dir); !bytes.Equal(got, b) {
				t.Fatalf("cut %d: the log did not go on after the last good record", cut)
			}
		}
	}
}

func TestEveryDamagedBitIsRefused(t *testing.T) {
	dir := newFilled(t, 3, 0)
	path, b := lastSegment(t, dir)
	for i := range b {
		d := bytes.Clone(b)
		d[i] ^= 1 << (i % 8)
		if err := os.WriteFile(path, d, 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := Open(dir, Options{})
		if err == nil {
			l.Close()
			t.Fatalf("byte %d changed and the log opened: %q", i, l.Recovered())
		}
		if !errors.Is(err, kms.Invalid) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "offset") {
			t.Fatalf("byte %d: %v", i, err)
		}
		if Read(dir, func(uint64, Entry) error { return nil }) == nil {
			t.Fatalf("byte %d changed and the log reads", i)
		}
	}
}

func TestDamagedSegmentsAreRefused(t *testing.T) {
	reopen := func(dir string) error {
		l, err := Open(dir, Options{})
		if err == nil {
			l.Close()
		}
		return err
	}
	at := func(dir string, i int) string {
		names, _ := accessKind.segments(dir)
		return filepath.Join(dir, names[i])
	}
	for name, harm := range map[string]func(dir string) error{
		"a missing segment in the middle": func(dir string) error { return os.Remove(at(dir, 1)) },
		"a missing first segment":         func(dir string) error { return os.Remove(at(dir, 0)) },
		"a cut segment in the middle":     func(dir string) error { return os.Truncate(at(dir, 1), int64(headerSize)+20) },
		"an empty segment":                func(dir string) error { return os.Truncate(at(dir, 0), 0) },
		"a segment of the other log":      func(dir string) error { return os.WriteFile(at(dir, 0), clusterKind.encode(header{}), 0o600) },
		"another first segment of the same length": func(dir string) error {
			// Valid in itself; the root in the next header gives it away.
			b, err := os.ReadFile(at(dir, 0))
			if err != nil {
				return err
			}
			n := len(entry(0).Marshal())
			out := bytes.Clone(b[:headerSize])
			for off := headerSize; off < len(b); off += frameSize + n {
				e := entry(int(off))
				e.Request = "req-forged00"[:12]
				out = appendFrame(out, e.Marshal(), len(out))
			}
			return os.WriteFile(at(dir, 0), out, 0o600)
		},
		"an odd name":         func(dir string) error { return os.WriteFile(filepath.Join(dir, "1.access"), nil, 0o600) },
		"a loose file mode":   func(dir string) error { return os.Chmod(at(dir, 0), 0o640) },
		"a loose folder mode": func(dir string) error { return os.Chmod(dir, 0o755) },
		"a symbolic link": func(dir string) error {
			p := at(dir, 0)
			if err := os.Rename(p, p+".moved"); err != nil {
				return err
			}
			return os.Symlink(p+".moved", p)
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := newFilled(t, 20, 1500)
			if err := harm(dir); err != nil {
				t.Fatal(err)
			}
			if err := reopen(dir); !errors.Is(err, kms.Invalid) {
				t.Errorf("Open: %v", err)
			} else {
				t.Log(err)
			}
			if err := Read(dir, func(uint64, Entry) error { return nil }); !errors.Is(err, kms.Invalid) {
				t.Errorf("Read: %v", err)
			}
		})
	}
}

// faultyDisk fails once armed.
type faultyDisk struct {
	osDisk
	onWrite, onZeros, onSync, onCreate atomic.Pointer[error]
	gate                               chan struct{} // if set, a sync waits for it
	syncing                            chan struct{}
}

type faultyFile struct {
	file
	d *faultyDisk
}

func armed(p *atomic.Pointer[error]) error {
	if e := p.Load(); e != nil {
		return *e
	}
	return nil
}

func (d *faultyDisk) create(dir, name string, h []byte) (file, error) {
	if err := armed(&d.onCreate); err != nil {
		return nil, err
	}
	f, err := d.osDisk.create(dir, name, h)
	return &faultyFile{f, d}, err
}

func (d *faultyDisk) resume(dir, name string, size int64) (file, error) {
	f, err := d.osDisk.resume(dir, name, size)
	return &faultyFile{f, d}, err
}

func (f *faultyFile) WriteAt(b []byte, off int64) (int, error) {
	failure := &f.d.onWrite
	if b[0] == 0 { // no record begins so
		failure = &f.d.onZeros
	}
	if err := armed(failure); err != nil {
		n, _ := f.file.WriteAt(b[:len(b)/2], off)
		return n, err
	}
	return f.file.WriteAt(b, off)
}

func (f *faultyFile) Sync() error {
	if f.d.gate != nil {
		f.d.syncing <- struct{}{}
		<-f.d.gate
	}
	if err := armed(&f.d.onSync); err != nil {
		return err
	}
	return f.file.Sync()
}

func TestWriteErrorsMakeTheLogReadOnly(t *testing.T) {
	for name, arm := range map[string]func(d *faultyDisk, err error){
		"write":  func(d *faultyDisk, err error) { d.onWrite.Store(&err) },
		"sync":   func(d *faultyDisk, err error) { d.onSync.Store(&err) },
		"create": func(d *faultyDisk, err error) { d.onCreate.Store(&err) },
	} {
		for _, cause := range []error{syscall.ENOSPC, syscall.EIO} {
			t.Run(name+" "+cause.Error(), func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "log")
				d := &faultyDisk{}
				l := mustOpen(t, dir, Options{disk: d, SegmentSize: 1})
				fill(t, l, 0, 2)
				root := l.Root()
				arm(d, cause)
				for range 3 {
					err := l.Append(t.Context(), entry(9))
					if !errors.Is(err, kms.ReadOnly) || !errors.Is(err, cause) {
						t.Fatalf("Append: %v", err)
					}
					d.onWrite.Store(nil)
					d.onSync.Store(nil)
					d.onCreate.Store(nil) // the disk is well again, the log stays closed to writing
				}
				if l.Size() != 2 || !bytes.Equal(l.Root(), root) {
					t.Error("an entry that is not durable is in the tree")
				}
				if !errors.Is(l.Failure(), kms.ReadOnly) || !errors.Is(l.Close(), kms.ReadOnly) {
					t.Error("the failure is not reported")
				}
				l = mustOpen(t, dir, Options{})
				if l.Size() < 2 {
					t.Errorf("after a restart %d entries", l.Size())
				}
				fill(t, l, 2, 4)
			})
		}
	}
}

func TestAppendAndContext(t *testing.T) {
	d := &faultyDisk{gate: make(chan struct{}), syncing: make(chan struct{})}
	l := mustOpen(t, filepath.Join(t.TempDir(), "log"), Options{disk: d})
	done, cancel := context.WithCancel(t.Context())
	cancel()
	if err := l.Append(done, entry(0)); !errors.Is(err, kms.Unavailable) {
		t.Errorf("a request that has ended: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	answer := make(chan error)
	go func() { answer <- l.Append(ctx, entry(1)) }()
	<-d.syncing
	if l.Size() != 0 {
		t.Error("an entry counts before it is durable")
	}
	cancel()
	if err := <-answer; !errors.Is(err, kms.Unavailable) || !errors.Is(err, context.Canceled) {
		t.Errorf("a request that ended meanwhile: %v", err)
	}
	d.gate <- struct{}{}
	closed := make(chan error)
	go func() { closed <- l.Close() }()
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if l.Size() != 1 {
		t.Error("the entry handed over was lost")
	}
	if err := l.Append(t.Context(), entry(2)); !errors.Is(err, kms.Unavailable) {
		t.Errorf("after Close: %v", err)
	}
}

func TestReadRefusesOtherEncodings(t *testing.T) {
	dir := newFilled(t, 1, 0)
	path, b := lastSegment(t, dir)
	for name, leaf := range map[string][]byte{
		"no entry":      {0xa0},
		"trailing byte": append(entry(1).Marshal(), 0),
	} {
		if err := os.WriteFile(path, appendFrame(bytes.Clone(b), leaf, len(b)), 0o600); err != nil {
			t.Fatal(err)
		}
		err := Read(dir, func(uint64, Entry) error { return nil })
		if !errors.Is(err, kms.Invalid) || !strings.Contains(err.Error(), fmt.Sprintf("%s at offset %d", path, len(b))) {
			t.Errorf("%s: %v", name, err)
		}
	}
	stop := errors.New("enough")
	if err := Read(newFilled(t, 3, 0), func(seq uint64, _ Entry) error {
		if seq == 1 {
			return stop
		}
		return nil
	}); !errors.Is(err, stop) {
		t.Errorf("the callback's error: %v", err)
	}
}

// TestCloseDoesNotWaitForMore closes the log while entries gather and after.
func TestCloseDoesNotWaitForMore(t *testing.T) {
	for range 20 {
		l := mustOpen(t, filepath.Join(t.TempDir(), "log"), Options{disk: memoryDisk{}})
		var wg sync.WaitGroup
		var good atomic.Uint64
		for range 8 {
			wg.Go(func() {
				for i := range 50 {
					err := l.Append(t.Context(), entry(i))
					if err != nil && !errors.Is(err, kms.Unavailable) {
						t.Error(err)
					}
					if err == nil {
						good.Add(1)
					}
				}
			})
		}
		for good.Load() < 20 {
			runtime.Gosched()
		}
		if err := l.Close(); err != nil {
			t.Error(err)
		}
		wg.Wait()
		if l.Size() != good.Load() {
			t.Errorf("%d entries durable, %d answered", l.Size(), good.Load())
		}
	}
}

func TestEntryLimits(t *testing.T) {
	l := mustOpen(t, filepath.Join(t.TempDir(), "log"), Options{})
	e := entry(0)
	e.Resource = strings.Repeat("x", MaxEntry)
	if err := l.Append(t.Context(), e); !errors.Is(err, kms.TooLarge) {
		t.Error(err)
	}
	if err := l.Append(t.Context(), Entry{}); err != nil {
		t.Error(err)
	}
}
