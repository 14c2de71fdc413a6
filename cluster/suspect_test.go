package cluster

import (
	"crypto/sha256"
	"slices"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
)

// watcher is a node that watches, step by step, on a clock of its own.
type watcher struct {
	t     *testing.T
	s     *suspects
	now   time.Time
	fresh time.Duration
	term  uint64
	lead  string
	again int
	has   bool // the state has the command, though it was not seen to come
	heard []Suspicion
	ticks map[string]time.Duration // of other nodes that sign their times every 5 s: how late they come in
}

const suspectLimit = 30 * time.Second

func newWatcher(t *testing.T) *watcher {
	w := &watcher{t: t, now: time.Now(), term: 1, lead: "de-1", ticks: map[string]time.Duration{"de-1": 0, "jp-1": 0}}
	w.s = newSuspects("fr-1", suspectLimit, func([]byte) bool { return !w.has }, func(x Suspicion) { w.heard = append(w.heard, x) })
	return w
}

// pass lets time pass, second by second.
func (w *watcher) pass(d time.Duration) {
	for end := w.now.Add(d); w.now.Before(end); {
		w.now = w.now.Add(time.Second)
		w.again += len(w.s.look(w.now, w.lead, w.term, w.fresh))
		if w.now.Unix()%5 == 0 {
			for node, late := range w.ticks {
				w.arrive(node, late)
			}
		}
	}
}

// arrive has a command of a node come in that it signed some time ago.
func (w *watcher) arrive(node string, late time.Duration) {
	w.s.applied(state.Leaf{Origin: node, Time: w.now.Add(-late).UnixMilli(), Command: make([]byte, sha256.Size)}, w.now)
}

// wants fails unless just these were reported, by kind and origin.
func (w *watcher) wants(what ...string) {
	w.t.Helper()
	var got []string
	for _, x := range w.heard {
		got = append(got, x.Kind+" "+x.Origin+" under "+x.Leader)
	}
	if slices.Sort(got); !slices.Equal(got, what) {
		w.t.Errorf("reported: %q, want %q", got, what)
	}
}

var command = []byte("a command")

func TestWithheld(t *testing.T) {
	lost := func(w *watcher) {
		w.s.hand(command, w.now)
		w.s.lose(command)
	}
	for name, c := range map[string]struct {
		course func(w *watcher)
		want   []string
	}{
		"a lost command does not come in": {func(w *watcher) { lost(w); w.pass(31 * time.Second) }, []string{"withheld fr-1 under de-1"}},
		"not at once":                     {func(w *watcher) { lost(w); w.pass(29 * time.Second) }, nil},
		"it comes in": {func(w *watcher) {
			lost(w)
			w.pass(29 * time.Second)
			sum := sha256.Sum256(command)
			w.s.applied(state.Leaf{Origin: "fr-1", Command: sum[:]}, w.now)
			w.pass(time.Hour)
		}, nil},
		"the state refuses it":    {func(w *watcher) { lost(w); w.pass(20 * time.Second); w.s.settled(command); w.pass(time.Hour) }, nil},
		"it came with a snapshot": {func(w *watcher) { lost(w); w.has = true; w.pass(time.Hour) }, nil},
		"another term":            {func(w *watcher) { lost(w); w.pass(29 * time.Second); w.term++; w.pass(29 * time.Second) }, nil},
		"another leader":          {func(w *watcher) { lost(w); w.pass(29 * time.Second); w.lead = "jp-1"; w.pass(29 * time.Second) }, nil},
		"the new leader neither":  {func(w *watcher) { lost(w); w.pass(29 * time.Second); w.lead = "jp-1"; w.pass(32 * time.Second) }, []string{"withheld fr-1 under jp-1"}},
		"this node leads":         {func(w *watcher) { w.lead = "fr-1"; lost(w); w.pass(time.Minute) }, nil},
		"nobody leads":            {func(w *watcher) { w.lead = ""; lost(w); w.pass(time.Minute) }, nil},
		"the leader out of reach": {func(w *watcher) { w.fresh = 8 * time.Second; lost(w); w.pass(time.Minute) }, nil},
		"a cut in between": {func(w *watcher) {
			lost(w)
			w.pass(20 * time.Second)
			w.fresh = 10 * time.Second
			w.pass(2 * time.Second)
			w.fresh = 0
			w.pass(29 * time.Second)
		}, nil},
		"this node stood still": {func(w *watcher) {
			lost(w)
			w.pass(20 * time.Second)
			w.now = w.now.Add(time.Minute)
			w.pass(29 * time.Second)
		}, nil},
		"refused again and again": {func(w *watcher) {
			for range 3 {
				w.s.hand(command, w.now)
				w.pass(20 * time.Second)
				w.s.refuse(command, w.now)
				w.pass(5 * time.Second)
			}
		}, []string{"withheld fr-1 under de-1"}},
		"refused once": {func(w *watcher) {
			w.s.hand(command, w.now)
			w.pass(25 * time.Second)
			w.s.refuse(command, w.now)
			w.pass(time.Hour)
		}, nil},
		"refused for a moment, often": {func(w *watcher) {
			for range 100 {
				w.s.hand(command, w.now)
				w.s.refuse(command, w.now)
				w.pass(5 * time.Second)
			}
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWatcher(t)
			w.pass(10 * time.Second)
			c.course(w)
			w.wants(c.want...)
		})
	}
}

// What is lost is handed in again every 5 s, for 25 s, and then no more.
func TestHandedAgain(t *testing.T) {
	w := newWatcher(t)
	w.s.hand(command, w.now)
	w.pass(8 * time.Second)
	if w.again != 0 {
		t.Errorf("handed in again %d times while it is under way", w.again)
	}
	w.s.lose(command)
	w.pass(time.Hour)
	if w.again != 4 {
		t.Errorf("handed in again %d times, want 4", w.again)
	}
	if len(w.s.handed) != 0 {
		t.Error("it is never forgotten")
	}
}

func TestBackdated(t *testing.T) {
	for name, c := range map[string]struct {
		course func(w *watcher)
		want   []string
	}{
		"nobody": {func(w *watcher) { w.pass(time.Hour) }, nil},
		"the leader, always": {func(w *watcher) {
			w.ticks["de-1"] = 5 * time.Minute
			w.pass(time.Minute)
		}, []string{"backdated de-1 under de-1"}},
		"another node, always": {func(w *watcher) {
			w.ticks["jp-1"] = 40 * time.Second
			w.pass(time.Minute)
		}, []string{"backdated jp-1 under de-1"}},
		"one command": {func(w *watcher) { w.pass(3 * time.Minute); w.arrive("jp-1", 2*time.Minute) }, []string{"backdated jp-1 under de-1"}},
		"one command, within the limit": {func(w *watcher) {
			w.pass(3 * time.Minute)
			w.arrive("jp-1", 29*time.Second)
		}, nil},
		"one from before the leader led": {func(w *watcher) { w.pass(3 * time.Minute); w.arrive("jp-1", 10*time.Minute) }, nil},
		"one from a node that was cut off": {func(w *watcher) {
			w.pass(3 * time.Minute)
			delete(w.ticks, "jp-1")
			w.pass(40 * time.Second)
			w.arrive("jp-1", 40*time.Second)
			w.ticks["jp-1"] = 0
			w.pass(10 * time.Second)
			w.arrive("jp-1", 50*time.Second)
			w.pass(time.Hour)
		}, nil},
		"all, since this node follows the leader: the own clock is wrong": {func(w *watcher) {
			w.term++
			w.pass(time.Second)
			w.ticks["de-1"], w.ticks["jp-1"] = time.Minute, time.Minute
			w.pass(time.Hour)
		}, nil},
		"all, one after the other: the own clock goes wrong": {func(w *watcher) {
			for late := time.Duration(0); late < time.Minute; late += time.Second {
				w.ticks["de-1"], w.ticks["jp-1"] = late, late+800*time.Millisecond
				w.pass(20 * time.Second)
			}
		}, nil},
		"the own clock is set": {func(w *watcher) {
			w.pass(3 * time.Minute)
			w.now = w.now.Round(0).Add(2 * time.Minute)
			w.arrive("jp-1", 2*time.Minute)
		}, nil},
		"this node catches up": {func(w *watcher) {
			w.pass(3 * time.Minute)
			w.now = w.now.Add(time.Minute)
			w.s.look(w.now, w.lead, w.term, 0)
			for late := time.Minute; late > 0; late -= time.Second {
				w.arrive("de-1", late)
				w.arrive("jp-1", late)
			}
			w.pass(time.Hour)
		}, nil},
		"an election": {func(w *watcher) {
			w.pass(3 * time.Minute)
			w.term++
			w.pass(10 * time.Second)
			w.arrive("jp-1", 40*time.Second)
			w.pass(time.Hour)
		}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWatcher(t)
			w.pass(2 * time.Minute)
			c.course(w)
			w.wants(c.want...)
		})
	}
}

// What the state recorded without effect carries a time that nobody vouches for.
func TestForgedTimes(t *testing.T) {
	w := newWatcher(t)
	w.pass(5 * time.Minute)
	w.s.applied(state.Leaf{Origin: "jp-1", Time: 1, Kind: kms.BadSignature, Command: make([]byte, sha256.Size)}, w.now)
	w.wants()
}
