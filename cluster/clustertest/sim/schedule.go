package sim

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// Options change what a schedule is played with.
type Options struct {
	LyingDisks bool                          // disks acknowledge writes that a crash loses
	Log        func(format string, a ...any) // optional: hears of every fault
}

// Report is what became of a schedule.
type Report struct {
	Seed     uint64
	Failures []string       // what must never be, empty when all is well
	Counts   map[string]int // what happened, by kind
	Trace    uint64         // hash of the log that came about: equal when a replay took the same way
	Elapsed  time.Duration  // simulated
}

// schedule is one run: a cluster, what happens to it, and who watches.
type schedule struct {
	t        *testing.T
	o        Options
	world    *world
	dice     dice
	rand     *rand.Rand // of the main goroutine
	timing   cluster.Timing
	patience time.Duration // of a client
	dir      string
	ids      []string
	hosts    map[string]*host
	net      *network
	watch    *watch
	nonces   uint64
	suspect  string // the site whose clocks may run ahead

	clients *sync.WaitGroup
	dying   *sync.WaitGroup

	mu   sync.Mutex
	due  []event
	wake chan struct{}
}

// event is something that the main goroutine is to do.
type event struct {
	at time.Time
	do func()
}

// Play plays the schedule of a seed. It must not run beside another one in the
// same process if it is to be replayed.
func (w *Worlds) Play(t *testing.T, seed uint64, o Options) Report {
	var r Report
	synctest.Test(t, func(t *testing.T) {
		seedRuntime(seed, true)
		defer seedRuntime(0, false)
		time.Sleep(time.Until(time.UnixMilli(statetest.Start).Add(time.Second)))
		r = w.play(t, seed, o)
	})
	return r
}

func (w *Worlds) play(t *testing.T, seed uint64, o Options) Report {
	d := dice(seed).of("schedule")
	s := &schedule{
		t: t, o: o, dice: d, rand: d.of("course").stream(), watch: newWatch(), hosts: map[string]*host{},
		clients: new(sync.WaitGroup), dying: new(sync.WaitGroup), wake: make(chan struct{}, 1),
	}
	began := time.Now()
	if err := s.run(w); err != nil {
		s.watch.fail("%v", err)
	}
	return Report{Seed: seed, Failures: s.watch.failures, Counts: s.watch.counts, Trace: s.watch.trace(), Elapsed: time.Since(began)}
}

func (s *schedule) run(w *Worlds) error {
	s.world = w.all[0]
	if s.rand.IntN(6) == 0 {
		s.world = w.all[1]
	}
	dir, err := os.MkdirTemp(scratch(), "conclave-sim-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	s.dir = dir
	s.ids = s.world.ids
	s.suspect = s.world.Node(pick(s.rand, s.ids)).Record.Site
	s.patience = between(s.rand, time.Second, 4*time.Second)
	s.timing = cluster.Timing{
		Heartbeat: 2 * time.Second, Election: time.Second, Lease: 500 * time.Millisecond, Commit: 200 * time.Millisecond,
		RPC: 2 * time.Second, Propose: 8 * time.Second, Stall: time.Minute, Suspect: 6 * time.Second,
		SnapshotInterval: between(s.rand, time.Second, 4*time.Second), SnapshotThreshold: 4 + s.rand.Uint64N(24), TrailingLogs: 1 + s.rand.Uint64N(10), HashEvery: 16,
	}
	s.net = newNetwork(s.dice, s.ids)
	s.net.jitter = between(s.rand, 0, 40*time.Millisecond)
	far := pick(s.rand, []time.Duration{time.Millisecond, 10 * time.Millisecond, 50 * time.Millisecond})
	for _, l := range s.net.links {
		l.delay = 500*time.Microsecond + l.dice.of("delay").upTo(far)
	}
	for _, id := range s.ids {
		h := &host{s: s, id: id, dir: filepath.Join(dir, id), keys: s.world.Node(id), dice: s.dice.of("host " + id), image: newImage(), swaps: map[string][]byte{},
			slow: between(s.rand, 0, 4*time.Millisecond)}
		h.site = h.keys.Record.Site
		s.hosts[id] = h
		time.Sleep(h.dice.of("start").upTo(10 * time.Millisecond)) // so that their periods do not coincide
		if err := h.start(); err != nil {
			return err
		}
	}
	defer s.end()
	if err := s.begin(); err != nil {
		return err
	}
	s.course()
	return s.settle()
}

// scratch returns a directory in memory where there is one: nothing is to outlast a run.
func scratch() string {
	if i, err := os.Stat("/dev/shm"); err == nil && i.IsDir() {
		return "/dev/shm"
	}
	return ""
}

// course is the troubled part of the schedule.
func (s *schedule) course() {
	end := time.Now().Add(between(s.rand, 3*time.Second, 7*time.Second))
	if s.dice%16 == 0 { // so that there is time to suspect somebody
		end = end.Add(20 * time.Second)
	}
	var work, tick, fault, mend func()
	mend = func() { s.mend(); s.later(100*time.Millisecond, mend) }
	s.later(0, mend)
	work = func() { s.work(); s.later(between(s.rand, 20*time.Millisecond, 500*time.Millisecond), work) }
	tick = func() { s.tick(); s.later(between(s.rand, time.Second, 5*time.Second), tick) }
	fault = func() { s.fault(); s.later(between(s.rand, 50*time.Millisecond, 1500*time.Millisecond), fault) }
	s.later(0, work)
	s.later(0, tick)
	s.later(0, fault)
	s.until(end)
	s.mu.Lock()
	s.due = nil
	s.mu.Unlock()
}

// later has the main goroutine do something.
func (s *schedule) later(d time.Duration, do func()) {
	s.mu.Lock()
	s.due = append(s.due, event{time.Now().Add(d), do})
	s.mu.Unlock()
	select {
	case s.wake <- struct{}{}:
	default:
	}
}

// until does what is due until a time.
func (s *schedule) until(end time.Time) {
	for {
		now := time.Now()
		if !now.Before(end) {
			return
		}
		s.mu.Lock()
		next := -1
		for i, e := range s.due {
			if next < 0 || e.at.Before(s.due[next].at) {
				next = i
			}
		}
		wait := end.Sub(now)
		var e event
		if next >= 0 {
			if e = s.due[next]; e.at.After(now) {
				wait, e.do = min(wait, e.at.Sub(now)), nil
			} else {
				s.due = slices.Delete(s.due, next, next+1)
			}
		}
		s.mu.Unlock()
		if e.do != nil {
			e.do()
			continue
		}
		select {
		case <-time.After(wait):
		case <-s.wake:
		}
	}
}

// up returns a node that runs, nil if there is none.
func (s *schedule) up() *life {
	var l []*life
	for _, id := range s.ids {
		if x := s.hosts[id].alive(); x != nil {
			l = append(l, x)
		}
	}
	if len(l) == 0 {
		return nil
	}
	return pick(s.rand, l)
}

// leader returns a node that leads, or takes itself to, else nil.
func (s *schedule) leader() *life {
	for _, id := range s.ids {
		if l := s.hosts[id].alive(); l != nil && l.node.Status().State == "leader" {
			return l
		}
	}
	return nil
}

func (s *schedule) count(what string) { s.add(what, 1) }

func (s *schedule) add(what string, n int) {
	s.watch.mu.Lock()
	defer s.watch.mu.Unlock()
	s.watch.counts[what] += n
}

func (s *schedule) note(format string, a ...any) {
	if s.o.Log != nil {
		s.o.Log("%s %s", time.Now().Format("05.000"), fmt.Sprintf(format, a...))
	}
}

// end stops everything.
func (s *schedule) end() {
	for _, id := range s.ids {
		s.hosts[id].resume()
		s.hosts[id].crash()
	}
	s.clients.Wait()
	s.dying.Wait()
	s.net.mu.Lock()
	c := s.net.counts
	s.net.mu.Unlock()
	s.add("messages", c.sent)
	s.add("messages lost", c.lost)
	s.add("messages doubled", c.doubled)
}
