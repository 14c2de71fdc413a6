package cluster

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"reflect"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
)

func frame(t testing.TB, v any) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := writeFrame(&b, v); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestFrames(t *testing.T) {
	result := state.Result{Index: 7, Kind: kms.Conflict, Message: "no", Duplicate: true, Leaf: []byte{1, 2},
		Events: []state.Event{{Type: "vote", Keyring: "a", Key: "b", Proposal: "c", Node: "d", Custodian: "e", Version: 3}}}
	want := response{ID: 1, Status: statusOK, Result: toOutcome(result), Index: 9, Age: 5, Hash: []byte{4}}
	var got response
	if err := readFrame(bytes.NewReader(frame(t, want)), maxFrame, &got); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got.Result.result(), result) || got.Index != 9 || got.Age != 5 {
		t.Errorf("got %+v", got)
	}
	if err := writeFrame(io.Discard, request{Raw: make([]byte, maxFrame)}); !errors.Is(err, kms.TooLarge) {
		t.Errorf("a huge message: %v", err)
	}
	var req request
	for name, b := range map[string][]byte{
		"too long":     binary.BigEndian.AppendUint32(nil, maxFrame+1),
		"cut short":    frame(t, request{ID: 1})[:10],
		"in the head":  {0, 0},
		"nothing":      {0, 0, 0, 0},
		"another type": frame(t, greeting{Node: "x"}),
		"text":         append(binary.BigEndian.AppendUint32(nil, 3), "GET"...),
	} {
		if err := readFrame(bytes.NewReader(b), maxFrame, &req); err == nil || err == io.EOF {
			t.Errorf("%s: got %v", name, err)
		}
	}
	if err := readFrame(bytes.NewReader(nil), maxFrame, &req); err != io.EOF {
		t.Errorf("at the end: %v", err)
	}
}

// The largest command that Propose takes fits into a frame.
func TestLargestCommand(t *testing.T) {
	b := frame(t, request{ID: 1<<64 - 1, Op: opPropose, Timeout: 1<<63 - 1, Raw: make([]byte, MaxCommand), Size: 1<<64 - 1})
	if err := readFrame(bytes.NewReader(b), maxRequest, new(request)); err != nil {
		t.Error(err)
	}
}

func TestResponseErrors(t *testing.T) {
	in := &kms.Error{Kind: kms.ReadOnly, Msg: "full", Fix: "empty it", Err: errors.New("secret cause")}
	out := errorResponse(in).err()
	var e *kms.Error
	if !errors.Is(out, kms.ReadOnly) || !errors.As(out, &e) || e.Msg != "full" || e.Fix != "empty it" || e.Err != nil {
		t.Errorf("got %#v", out)
	}
	if err := errorResponse(errors.New("internal detail")).err(); !errors.Is(err, kms.Internal) || bytes.Contains([]byte(err.Error()), []byte("detail")) {
		t.Errorf("got %v", err)
	}
	if err := (response{Status: statusNotLeader}).err(); !errors.Is(err, errNotAppended) {
		t.Errorf("got %v", err)
	}
	if err := (response{}).err(); err == nil {
		t.Error("an unknown status is no error")
	}
}

// FuzzFrame feeds the decoder of both directions: what it accepts encodes to the
// same bytes again.
func FuzzFrame(f *testing.F) {
	f.Add(frame(f, request{ID: 1, Op: opPropose, Timeout: 5, Raw: []byte("raw")}))
	f.Add(frame(f, response{ID: 1, Status: statusError, Kind: 3, Message: "m", Result: outcome{Index: 2, Events: []event{{Type: "t"}}}}))
	f.Add(frame(f, greeting{Node: "n", Cluster: "c"}))
	f.Add([]byte{0, 0, 0, 1, 0xa0})
	f.Fuzz(func(t *testing.T, b []byte) {
		var q request
		var p response
		var g greeting
		for _, v := range []any{&q, &p, &g} {
			r := bytes.NewReader(b)
			if readFrame(r, maxFrame, v) != nil {
				continue
			}
			again := frame(t, reflect.ValueOf(v).Elem().Interface())
			if !bytes.Equal(again, b[:len(b)-r.Len()]) {
				t.Errorf("%x became %x", b, again)
			}
			p.Result.result()
		}
	})
}

func TestJudge(t *testing.T) {
	a, b, c := []byte("aaaaaaaa"), []byte("bbbbbbbb"), []byte("cccccccc")
	for _, tc := range []struct {
		name   string
		voters int
		others map[string][]byte
		halt   bool
	}{
		{"alone", 1, nil, false},
		{"all agree", 3, map[string][]byte{"2": a, "3": a}, false},
		{"nobody answers", 3, nil, false},
		{"one differs, one does not answer", 3, map[string][]byte{"2": b}, false},
		{"another one is wrong", 3, map[string][]byte{"2": a, "3": b}, false},
		{"this one is wrong", 3, map[string][]byte{"2": b, "3": b}, true},
		{"all differ", 3, map[string][]byte{"2": b, "3": c}, true},
		{"two against two", 4, map[string][]byte{"2": a, "3": b, "4": b}, true},
		{"two against one, one does not answer", 4, map[string][]byte{"2": b, "3": b}, false},
		{"three against one", 4, map[string][]byte{"2": b, "3": b, "4": b}, true},
		{"a majority against this one, one does not answer", 5, map[string][]byte{"2": b, "3": b, "4": b}, true},
	} {
		if err := judge(8, tc.voters, true, a, tc.others); (err != nil) != tc.halt {
			t.Errorf("%s: got %v", tc.name, err)
		}
	}
	// A node without a vote is judged by the voters and does not count itself.
	for _, tc := range []struct {
		name   string
		voters int
		others map[string][]byte
		halt   bool
	}{
		{"the only voter agrees", 1, map[string][]byte{"1": a}, false},
		{"the only voter differs", 1, map[string][]byte{"1": b}, true},
		{"nobody answers", 3, nil, false},
		{"one of three is wrong", 3, map[string][]byte{"1": a, "2": a, "3": b}, false},
		{"two of three differ", 3, map[string][]byte{"1": b, "2": b}, true},
		{"one against one, one does not answer", 3, map[string][]byte{"1": a, "2": b}, false},
		{"two against two", 4, map[string][]byte{"1": a, "2": a, "3": b, "4": b}, true},
	} {
		if err := judge(8, tc.voters, false, a, tc.others); (err != nil) != tc.halt {
			t.Errorf("without a vote, %s: got %v", tc.name, err)
		}
	}
}

// Proofs count when the log has caught up with them.
func TestProofs(t *testing.T) {
	var p proofs
	if !p.latest(100).IsZero() {
		t.Error("fresh without a proof")
	}
	base := timeAt(0)
	for i := range 2 * maxPending {
		p.note(uint64(10+i), timeAt(i))
	}
	if got := p.latest(9); !got.IsZero() {
		t.Errorf("at 9: %v", got)
	}
	if got := p.latest(10); !got.Equal(base) {
		t.Errorf("at 10: %v", got)
	}
	if got := p.latest(12); !got.Equal(timeAt(2)) {
		t.Errorf("at 12: %v", got)
	}
	if got := p.latest(5); !got.Equal(timeAt(2)) {
		t.Errorf("back at 5: %v", got)
	}
	if got := p.latest(10 + 2*maxPending); !got.Equal(timeAt(2*maxPending - 1)) {
		t.Errorf("at the end: %v", got)
	}
}

func timeAt(i int) time.Time { return time.Unix(1_700_000_000+int64(i), 0) }
