package secret

import (
	"bytes"
	"encoding/gob"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"strings"
	"sync"
	"testing"

	"pgregory.net/rapid"
)

func must(t testing.TB) func(*Bytes, error) *Bytes {
	return func(s *Bytes, err error) *Bytes {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
}

func TestLengths(t *testing.T) {
	for _, n := range []int{0, 1, 31, 32, 33, 64, 4096, 16 << 10, 16<<10 + 1, MaxLen} {
		s := must(t)(New(n))
		if s.Len() != n || len(s.Reveal()) != n || cap(s.Reveal()) != n {
			t.Errorf("New(%d) has length %d and capacity %d", n, s.Len(), cap(s.Reveal()))
		}
		if !bytes.Equal(s.Reveal(), make([]byte, n)) {
			t.Errorf("New(%d) is not zeroed", n)
		}
		s.Destroy()
	}
	for _, n := range []int{-1, MaxLen + 1} {
		if s, err := New(n); !errors.Is(err, ErrTooLarge) || s != nil {
			t.Errorf("New(%d): %v", n, err)
		}
	}
}

func TestCopyMove(t *testing.T) {
	src := []byte("attack at dawn")
	c := must(t)(Copy(src))
	defer c.Destroy()
	if !bytes.Equal(c.Reveal(), src) || &c.Reveal()[0] == &src[0] {
		t.Error("Copy is not a copy")
	}
	m := must(t)(Move(src))
	defer m.Destroy()
	if !m.Equal(c) {
		t.Error("Move changed the contents")
	}
	if !bytes.Equal(src, make([]byte, len(src))) {
		t.Error("Move left the source as it was")
	}
	long := bytes.Repeat([]byte{1}, MaxLen+1)
	if _, err := Move(long); !errors.Is(err, ErrTooLarge) {
		t.Errorf("Move of too much: %v", err)
	}
	if !bytes.Equal(long, make([]byte, len(long))) {
		t.Error("a Move that failed left the source as it was")
	}
}

func TestDestroy(t *testing.T) {
	s := must(t)(Copy(bytes.Repeat([]byte{0xa5}, 100)))
	mem := s.Reveal() // the slot stays mapped
	s.Destroy()
	if !bytes.Equal(mem, make([]byte, 100)) {
		t.Error("the bytes survived Destroy")
	}
	if s.Len() != 0 || s.Reveal() != nil {
		t.Error("a destroyed secret still has bytes")
	}
	s.Destroy()
	a, b := must(t)(New(100)), must(t)(New(100))
	defer a.Destroy()
	defer b.Destroy()
	if &a.Reveal()[0] == &b.Reveal()[0] {
		t.Error("a second Destroy gave the slot away twice")
	}
	var none *Bytes
	none.Destroy()
	var zero Bytes
	zero.Destroy()
	if none.Len() != 0 || none.Reveal() != nil || zero.Len() != 0 || zero.Reveal() != nil {
		t.Error("nil and the zero value are not empty")
	}
}

func TestEqual(t *testing.T) {
	a, b := must(t)(Copy([]byte("one"))), must(t)(Copy([]byte("one")))
	c, d := must(t)(Copy([]byte("two"))), must(t)(Copy([]byte("ones")))
	if !a.Equal(b) || a.Equal(c) || a.Equal(d) || a.Equal(nil) {
		t.Error("Equal is wrong")
	}
	var none *Bytes
	if !none.Equal(&Bytes{}) || none.Equal(a) {
		t.Error("Equal of empty secrets is wrong")
	}
	for _, s := range []*Bytes{a, b, c, d} {
		s.Destroy()
	}
}

// TestRedaction prints a secret in every way that a careless programmer might.
func TestRedaction(t *testing.T) {
	const text = "hunter2-hunter2-hunter2"
	s := must(t)(Copy([]byte(text)))
	defer s.Destroy()
	type byPointer struct {
		K *Bytes
		k *Bytes
	}
	type byValue struct {
		K Bytes
		k Bytes
	}
	value := &byValue{}
	value.K.slot.Store(s.slot.Load())
	value.k.slot.Store(s.slot.Load())
	var out bytes.Buffer
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%o", "%c", "%U", "%t", "%08x", "% x"} {
		fmt.Fprintf(&out, verb+"\n", s)
		fmt.Fprintf(&out, verb+"\n", byPointer{s, s})
		fmt.Fprintf(&out, verb+"\n", &byPointer{s, s})
		fmt.Fprintf(&out, verb+"\n", value)
		fmt.Fprintf(&out, verb+"\n", []*Bytes{s})
		fmt.Fprintf(&out, verb+"\n", map[string]*Bytes{"k": s})
		fmt.Fprintf(&out, verb+"\n", fmt.Errorf("bad: %v", s))
	}
	fmt.Fprintln(&out, s, byPointer{s, s})
	for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
		slog.New(h).Info("opened", "key", s, "in", byPointer{s, s}, "value", value)
	}
	for _, v := range []any{s, byPointer{s, s}, []*Bytes{s}, value} {
		b, err := json.Marshal(v)
		if err != nil {
			t.Errorf("json: %v", err)
		}
		out.Write(b)
	}
	b, err := xml.Marshal(byPointer{s, s})
	if err != nil {
		t.Errorf("xml: %v", err)
	}
	out.Write(b)
	if err := gob.NewEncoder(&out).Encode(s); err == nil {
		t.Error("gob serialised a secret")
	}
	printed := strings.ToLower(out.String())
	for _, leak := range []string{
		"hunter", fmt.Sprintf("%x", "hunter"), fmt.Sprintf("% x", "hunter"), "104 117 110", "aHVudGVy", "u+0068",
	} {
		if strings.Contains(printed, strings.ToLower(leak)) {
			t.Errorf("printed the secret as %q", leak)
		}
	}
	if strings.Count(printed, redacted) < 50 {
		t.Error("the fixed text does not stand where the secret was")
	}
}

func TestWipe(t *testing.T) {
	b := []byte{1, 2, 3}
	Wipe(b)
	Wipe(nil)
	if !bytes.Equal(b, []byte{0, 0, 0}) {
		t.Error("not wiped")
	}
}

// TestFinalizer wants an abandoned secret to be zeroised by the collector.
func TestFinalizer(t *testing.T) {
	gone := make(chan struct{})
	mem := func() []byte {
		s := must(t)(Copy(bytes.Repeat([]byte{7}, 48)))
		runtime.AddCleanup(s, func(c chan struct{}) { close(c) }, gone)
		return s.Reveal()
	}()
	for done := false; !done; {
		runtime.GC()
		select {
		case <-gone: // cleanups run after finalizers let the object go
			done = true
		default:
			runtime.Gosched()
		}
	}
	arena.mu.Lock()
	defer arena.mu.Unlock()
	if !bytes.Equal(mem, make([]byte, 48)) {
		t.Error("an abandoned secret was not zeroised")
	}
}

// TestArenaModel takes and gives back secrets at random and checks that no two
// share memory and that new ones are zeroed.
func TestArenaModel(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		type held struct {
			s    *Bytes
			mark byte
		}
		var all []held
		defer func() {
			for _, h := range all {
				h.s.Destroy()
			}
		}()
		for i := range rapid.IntRange(1, 60).Draw(t, "steps") {
			if len(all) > 0 && rapid.Bool().Draw(t, "destroy") {
				j := rapid.IntRange(0, len(all)-1).Draw(t, "which")
				all[j].s.Destroy()
				all = append(all[:j], all[j+1:]...)
				continue
			}
			n := rapid.IntRange(0, 300).Draw(t, "n")
			s, err := New(n)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(s.Reveal(), make([]byte, n)) {
				t.Fatal("a new secret is not zeroed")
			}
			for k := range s.Reveal() {
				s.Reveal()[k] = byte(i + 1)
			}
			all = append(all, held{s, byte(i + 1)})
		}
		for _, h := range all {
			if !bytes.Equal(h.s.Reveal(), bytes.Repeat([]byte{h.mark}, h.s.Len())) {
				t.Fatal("two secrets share memory")
			}
		}
	})
}

func TestConcurrentUse(t *testing.T) {
	shared := must(t)(Copy([]byte("shared by all")))
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			for range 200 {
				s, err := New(32 << (i % 3))
				if err != nil {
					t.Error(err)
					return
				}
				for k := range s.Reveal() {
					s.Reveal()[k] = byte(i)
				}
				if !bytes.Equal(s.Reveal(), bytes.Repeat([]byte{byte(i)}, s.Len())) {
					t.Error("another goroutine wrote here")
				}
				if shared.Len() != 13 {
					t.Error("shared secret changed")
				}
				var both sync.WaitGroup
				both.Go(s.Destroy)
				s.Destroy()
				both.Wait()
			}
		})
	}
	wg.Wait()
	shared.Destroy()
}

func BenchmarkNewDestroy(b *testing.B) {
	b.ReportAllocs()
	for b.Loop() {
		s, err := New(32)
		if err != nil {
			b.Fatal(err)
		}
		s.Destroy()
	}
}
