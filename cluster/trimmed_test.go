package cluster

import (
	"errors"
	"testing"

	"github.com/hashicorp/raft"
)

func openTrimmedLog(t *testing.T, s *raft.InmemStore) *trimmedLog {
	t.Helper()
	l, err := openTrimmed(s, s)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// A log that begins right after a snapshot knows the term of the snapshot's last entry, and
// nothing of any other entry that it does not hold.
func TestLogAfterSnapshot(t *testing.T) {
	for name, c := range map[string]struct {
		first uint64
		terms []uint64
		asked uint64
		term  uint64 // 0: not found
	}{
		"it begins after the snapshot":  {6, []uint64{4}, 5, 3},
		"the entry before that one":     {6, []uint64{4}, 4, 0},
		"it has the entry":              {5, []uint64{2, 4}, 5, 2},
		"it begins later":               {7, []uint64{4}, 5, 0},
		"it ends before the snapshot":   {1, []uint64{1, 1}, 5, 0},
		"it has nothing":                {1, nil, 5, 0},
		"beyond its end":                {6, []uint64{4}, 7, 0},
		"an entry that it has":          {6, []uint64{4}, 6, 4},
		"no entry has the index of 0":   {1, []uint64{1}, 0, 0},
		"the entry before, of a hole":   {1, []uint64{1, 1, 1, 1}, 5, 0},
		"an entry below, that it holds": {3, []uint64{1, 1}, 4, 1},
	} {
		t.Run(name, func(t *testing.T) {
			l := openTrimmedLog(t, entries(t, c.first, c.terms...))
			l.snapshotAt(5, 3)
			l.snapshotAt(2, 1) // an older one
			var e raft.Log
			err := l.GetLog(c.asked, &e)
			switch {
			case c.term == 0 && !errors.Is(err, raft.ErrLogNotFound):
				t.Errorf("%+v, %v", e, err)
			case c.term != 0 && (err != nil || e.Term != c.term || e.Index != c.asked):
				t.Errorf("%+v, %v", e, err)
			}
		})
	}
}

// What was promised up to the end of a log that a leader has cut back stands as kept, in
// the next run too, and only up to there.
func TestCutLog(t *testing.T) {
	store := entries(t, 1, 1, 1, 2, 2)
	l := openTrimmedLog(t, store)
	if err := l.DeleteRange(1, 2); err != nil {
		t.Fatal(err)
	}
	own := position{Term: 3, LogTerm: 2, Index: 4}
	if l.reached(own) != own || l.reached(position{}) != (position{}) {
		t.Error("the beginning of a log was removed, and the end counts as cut")
	}
	if err := l.DeleteRange(3, 4); err != nil {
		t.Fatal(err)
	}
	if last, err := l.LastIndex(); err != nil || last != 0 {
		t.Fatalf("the log ends at %d, %v", last, err)
	}
	if err := l.StoreLog(&raft.Log{Index: 3, Term: 1}); err != nil {
		t.Fatal(err)
	}
	if err := l.DeleteRange(3, 9); err != nil { // less than before
		t.Fatal(err)
	}
	for _, run := range []*trimmedLog{l, openTrimmedLog(t, store)} {
		at := run.reached(position{Term: 3})
		if at != own {
			t.Errorf("the log is known to have reached %+v", at)
		}
		if at.before(own) || !at.before(position{Term: 3, LogTerm: 2, Index: 5}) || !at.before(position{Term: 4}) {
			t.Error("other promises count as kept than those that were")
		}
	}
	if term, ok := l.term(4); ok {
		t.Errorf("the entry that was cut has term %d", term)
	}
}

// What is noted of a cut must be readable, or the node does not start.
func TestDamagedCut(t *testing.T) {
	s := raft.NewInmemStore()
	if err := s.Set([]byte(keyCut), []byte{0xff}); err != nil {
		t.Fatal(err)
	}
	if _, err := openTrimmed(s, s); err == nil {
		t.Error("a damaged note is taken")
	}
}
