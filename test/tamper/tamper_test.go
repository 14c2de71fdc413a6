package tamper

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/note"
	"github.com/conclave-kms/conclave/kms/state"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// tally counts what was tried and found.
type tally struct{ tried, alone, remembered int }

// suite is a coalition with two exports of it, the older one from before the newer one.
type suite struct {
	*coalition
	older, newer string
	seen         []audit.SeenHead // by a verifier of the newer export
	counts       map[string]*tally
	order        []string
	reasons      map[string]string
}

func newSuite(t *testing.T) *suite {
	s := &suite{coalition: newCoalition(t), older: filepath.Join(t.TempDir(), "older"), newer: filepath.Join(t.TempDir(), "newer"), counts: map[string]*tally{}, reasons: map[string]string{}}
	s.live(s.older, s.newer)
	old, err := verify(t, s.coalition, s.older, nil)
	if err != nil {
		t.Fatalf("the older export, untouched: %v", err)
	}
	began := time.Now()
	r, err := verify(t, s.coalition, s.newer, old.Seen)
	if err != nil {
		t.Fatalf("the newer export, untouched, against the older one: %v", err)
	}
	t.Logf("untouched: verified, %d commands with %d refused, %d checkpoints, %d states, %v", r.Commands, r.Refused, r.Checkpoints, r.States, time.Since(began).Round(time.Millisecond))
	if again, err := verify(t, s.coalition, s.newer, r.Seen); err != nil || again.Tail != 0 || len(r.Logs) != 4 || r.Evidence != 1 || r.States < 2 {
		t.Fatalf("the newer export, untouched, again: %v: %+v", err, again)
	}
	s.seen = r.Seen
	return s
}

// expect counts one attack, which must be found by who has seen the last cosigned checkpoint.
func (s *suite) expect(t *testing.T, log, kind, what, dir string) {
	t.Helper()
	key := fmt.Sprintf("%-20s %s", log, kind)
	if s.counts[key] == nil {
		s.counts[key], s.order = &tally{}, append(s.order, key)
	}
	n := s.counts[key]
	n.tried++
	_, err := verify(t, s.coalition, dir, nil)
	if err != nil {
		n.alone++ // what is seen only adds to it
	} else if _, err = verify(t, s.coalition, dir, s.seen); err == nil {
		t.Errorf("%s: %s %s is not detected", log, kind, what)
		return
	}
	n.remembered++
	s.reasons[key+" "+what] = err.Error()
}

func (s *suite) print(t *testing.T) {
	var all tally
	for _, key := range s.order {
		n := s.counts[key]
		t.Logf("%-32s %3d tried, %3d detected (%d of them without any memory of the log)", key, n.tried, n.remembered, n.alone)
		all.tried, all.remembered = all.tried+n.tried, all.remembered+n.remembered
	}
	for _, what := range slices.Sorted(maps.Keys(s.reasons)) {
		if strings.Contains(what, "re-signed") || strings.Contains(what, "roll back") {
			t.Logf("%s: %s", what, s.reasons[what])
		}
	}
	t.Logf("%d of %d detected against the last cosigned checkpoint", all.remembered, all.tried)
	if all.tried < 100 {
		t.Errorf("only %d attacks were tried", all.tried)
	}
}

// TestTampering changes each log in each way at several places, as somebody can who holds the
// files, and as somebody can who has a node's keys.
func TestTampering(t *testing.T) {
	s := newSuite(t)
	for _, log := range []string{note.ClusterLog, note.AccessLog(stolen)} {
		l, checkpoint := readLog(t, s.newer, log)
		for _, ch := range changes {
			for _, at := range []int{1, len(l) / 2, len(l) - 2} {
				changed := ch.do(s.coalition, l, at)
				s.without(t, log, ch.name, at, changed, checkpoint)
				s.resign(t, log, ch.name, at, changed)
			}
		}
		s.rollBack(t, log)
	}
	s.lose(t)
	s.print(t)
}

// without is what can be done without any key.
func (s *suite) without(t *testing.T, log, kind string, at int, l list, checkpoint []byte) {
	dir := copyOf(t, s.newer)
	inPlace(t, dir, log, l)
	s.expect(t, log, kind, fmt.Sprintf("at %d, tiles as they were", at), dir)

	dir = copyOf(t, s.newer)
	writeLog(t, dir, log, l, checkpoint)
	s.expect(t, log, kind, fmt.Sprintf("at %d, checkpoint as it was", at), dir)

	writeLog(t, dir, log, l, withOldSignatures(l, checkpoint))
	s.expect(t, log, kind, fmt.Sprintf("at %d, signatures as they were", at), dir)
}

// resign is what can be done with the keys of a node: a log that is consistent in itself
// under a checkpoint that its node has signed.
func (s *suite) resign(t *testing.T, log, kind string, at int, l list) {
	kind += ", re-signed"
	dir := copyOf(t, s.newer)
	if log != note.ClusterLog {
		writeLog(t, dir, log, l, s.resigned(log, l, nil))
		s.expect(t, log, kind, fmt.Sprintf("at %d", at), dir)
		return
	}
	whole, st := s.consistent(l)
	writeLog(t, dir, log, whole, s.resigned(log, whole, st))
	s.expect(t, log, kind, fmt.Sprintf("at %d", at), dir)

	bare, st := s.consistent(without(t, whole, min(at, len(whole))))
	writeLog(t, dir, log, bare, s.resigned(log, bare, st))
	s.expect(t, log, kind, fmt.Sprintf("at %d, others' cosignatures left out", at), dir)

	// All access logs are gone too, so that nothing contradicts it.
	if err := os.RemoveAll(filepath.Join(dir, "access")); err != nil {
		t.Fatal(err)
	}
	s.expect(t, log, kind, fmt.Sprintf("at %d, alone", at), dir)
}

// rollBack puts an older copy, with all its cosignatures, in the place of a log.
func (s *suite) rollBack(t *testing.T, log string) {
	l, checkpoint := readLog(t, s.older, log)
	dir := copyOf(t, s.newer)
	writeLog(t, dir, log, l, checkpoint)
	s.expect(t, log, "roll back", "to an older copy", dir)
	if log == note.ClusterLog {
		s.expect(t, log, "roll back", "of all logs", copyOf(t, s.older))
	}

	// The older log under a new signature of the node.
	var st *state.State
	if log == note.ClusterLog {
		_, st = s.replayed(l)
	}
	writeLog(t, dir, log, l, s.resigned(log, l, st))
	s.expect(t, log, "roll back", "signed again", dir)
}

// replayed carries the commands of a log out at their places.
func (s *suite) replayed(l list) (list, *state.State) {
	st, err := state.New(s.w.Signed())
	if err != nil {
		s.t.Fatal(err)
	}
	for _, x := range l {
		if st, err = audit.Replay(st, audit.Record{Raw: x.command, Leaf: x.leaf}); err != nil {
			s.t.Fatal(err)
		}
	}
	return l, st
}

// lose takes whole logs away, and single files.
func (s *suite) lose(t *testing.T) {
	for _, log := range append([]string{note.ClusterLog}, s.accessLogs()...) {
		dir := copyOf(t, s.newer)
		if err := os.RemoveAll(filepath.Join(dir, filepath.FromSlash(log))); err != nil {
			t.Fatal(err)
		}
		s.expect(t, log, "drop", "of the whole log", dir)
	}
	for _, file := range []string{"genesis.cbor", "cluster/checkpoint", "cluster/tile/0/000.p", "cluster/commands/000.p", "access/" + stolen + "/tile/0/000", "access/" + stolen + "/tile/entries/000"} {
		dir := copyOf(t, s.newer)
		if err := os.RemoveAll(filepath.Join(dir, filepath.FromSlash(file))); err != nil {
			t.Fatal(err)
		}
		s.expect(t, "files", "drop", file, dir)
	}
}

// TestTail: what no majority has cosigned yet verifies and is told.
func TestTail(t *testing.T) {
	c := newCoalition(t)
	older, newer := filepath.Join(t.TempDir(), "older"), filepath.Join(t.TempDir(), "newer")
	c.live(older, newer)
	size := c.access[stolen].Size()
	c.use(stolen, 5)
	c.pass(1_000_000_000)
	c.w.Do(stolen, c.submission(stolen)) // nobody cosigns it
	c.export(newer)
	r, err := verify(t, c, newer, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range r.Logs {
		want := uint64(0)
		if l.Log == note.AccessLog(stolen) {
			want = 5
		}
		if l.Tail != want || l.Cosigned != l.Size-want {
			t.Errorf("%s: %d leaves, %d cosigned, tail %d", l.Log, l.Size, l.Cosigned, l.Tail)
		}
	}
	if r.Tail != 5 || size == 0 {
		t.Errorf("tail %d", r.Tail)
	}
}
