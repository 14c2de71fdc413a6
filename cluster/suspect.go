package cluster

import (
	"cmp"
	"crypto/sha256"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms/state"
)

// Kinds of a Suspicion.
const (
	// Withheld: the leader was within reach all the while, and a command of this node did
	// not enter the log.
	Withheld = "withheld"
	// Backdated: the commands of a node enter the log long after the times that it signs.
	Backdated = "backdated"
)

// Suspicion is what this node has seen of others that no honest leader and no right clock
// would show. It is reported and changes nothing: a leader's disk that hangs, or a
// node's clock that is behind, looks the same.
type Suspicion struct {
	Kind    string
	Leader  string // in whose time as leader
	Term    uint64
	Origin  string // whose commands
	First   time.Time
	Last    time.Time
	Count   uint64        // commands
	Delay   time.Duration // the longest
	Command []byte        // SHA-256 of the latest, nil for one that the leader did not take
	Text    string        // for people
}

const (
	// maxHanded bounds the commands that are watched on their way into the log.
	maxHanded = 256
	// suspicionsFor is how many limits long a suspicion is shown.
	suspicionsFor = 120
)

// suspects watches what becomes of this node's commands, and when others' come in. All
// accusations take a leader that led, and was within reach, from before the cause until
// now: what a cut, an election, a pause or a step of the own clock explains is none.
type suspects struct {
	self   string
	limit  time.Duration
	report func(Suspicion)       // of every new one, with no lock held
	open   func(raw []byte) bool // whether the state here would take a command: it is not in the log

	mu      sync.Mutex
	handed  map[[sha256.Size]byte]*handed
	origins map[string]*pace
	refused refused
	found   map[string]*Suspicion

	leader string // "" or this node: nobody to watch
	term   uint64
	since  time.Time // from when on leader has led in term, in reach of a node that did not stand still
	looked time.Time
}

// handed is a command of this node that is not in its log yet.
type handed struct {
	raw   []byte
	first time.Time // when it was handed in
	tried time.Time // when last
	lost  bool      // nobody waits for it any more, and its outcome is not known
	told  bool
}

// refused sums up the time in which the leader took a command for none of its own.
type refused struct {
	since time.Time
	times uint64
	total time.Duration
}

// pace is how the commands of another node come in.
type pace struct {
	since  time.Time // from when on there was no long gap
	last   time.Time
	prompt time.Time     // when the last came in time
	late   time.Duration // of the last, by this node's clock
}

func newSuspects(self string, limit time.Duration, open func(raw []byte) bool, report func(Suspicion)) *suspects {
	return &suspects{self: self, limit: limit, open: open, report: report, handed: map[[sha256.Size]byte]*handed{}, origins: map[string]*pace{}, found: map[string]*Suspicion{}}
}

// most is for how long a command is handed in, so that what an honest leader takes is in the
// log before the limit.
func (s *suspects) most() time.Duration { return s.limit * 5 / 6 }

// hand notes that a command is handed in from now on.
func (s *suspects) hand(raw []byte, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.handed) < maxHanded {
		s.handed[sha256.Sum256(raw)] = &handed{raw: raw, first: now, tried: now}
	}
}

// settled forgets a command: it is in the log, or this node's own state refuses it.
func (s *suspects) settled(raw []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.handed, sha256.Sum256(raw))
}

// lose notes that nobody waits any more for a command whose outcome is not known.
func (s *suspects) lose(raw []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h, ok := s.handed[sha256.Sum256(raw)]; ok {
		h.lost = true
	}
}

// refuse notes that the leader has taken a command for as long as it was handed in: whoever
// gave it was told so, and it must not come in later.
func (s *suspects) refuse(raw []byte, now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	sum := sha256.Sum256(raw)
	h, ok := s.handed[sum]
	delete(s.handed, sum)
	if !ok || !s.watching() || h.first.Before(s.since) {
		return
	}
	r := &s.refused
	if r.since.Before(s.since) || now.Sub(r.since) > 10*s.limit {
		*r = refused{since: h.first}
	}
	r.times++
	r.total += now.Sub(h.first)
}

// watching reports whether there is a leader to watch.
func (s *suspects) watching() bool { return s.leader != "" && s.leader != s.self }

// stood reports whether this node has stood still since it last looked, or its clock was set.
func (s *suspects) stood(now time.Time) bool {
	gone, set := apart(s.looked, now)
	return !s.looked.IsZero() && (gone > s.limit/4 || set > s.limit/15)
}

// apart returns how far two readings of this node's clocks are apart, by the one that says more,
// and by how much its wall clock was set in between.
func apart(from, to time.Time) (gone, set time.Duration) {
	running, wall := to.Sub(from), to.Round(0).Sub(from.Round(0))
	return max(running, wall), (wall - running).Abs()
}

// look is called again and again with what is known of the leader. It returns the commands
// that are to be handed in again.
func (s *suspects) look(now time.Time, leader string, term uint64, fresh time.Duration) (again [][]byte) {
	s.mu.Lock()
	steady := leader == s.leader && term == s.term && fresh <= s.limit/4
	if s.stood(now) {
		steady = false
		clear(s.origins) // their pace was taken by another clock, or while this node stood still
	}
	s.looked = now
	if !steady {
		s.leader, s.term, s.since = leader, term, now
		for _, h := range s.handed {
			h.told = false
		}
	}
	found := s.withheld(now)
	for sum, h := range s.handed {
		age := now.Sub(h.first)
		if age > 4*s.limit {
			delete(s.handed, sum)
		}
		if h.lost && age < s.most() && now.Sub(h.tried) >= s.limit/6 {
			h.tried = now
			again = append(again, h.raw)
		}
	}
	for key, x := range s.found {
		if now.Sub(x.Last) > suspicionsFor*s.limit {
			delete(s.found, key)
		}
	}
	s.mu.Unlock()
	for _, x := range found {
		s.report(x)
	}
	return again
}

// withheld finds commands of this node that the leader had the time to propose.
func (s *suspects) withheld(now time.Time) (first []Suspicion) {
	if !s.watching() {
		return nil
	}
	add := func(command []byte, delay time.Duration, count uint64, text string) {
		if x, isNew := s.find(Withheld, s.self, command, delay, count, now, text); isNew {
			first = append(first, x)
		}
	}
	for sum, h := range s.handed {
		if h.told || now.Sub(later(h.first, s.since)) < s.limit {
			continue
		}
		if !s.open(h.raw) { // as after a snapshot that has it
			delete(s.handed, sum)
			continue
		}
		h.told = true
		add(sum[:], now.Sub(h.first), 1, fmt.Sprintf("a command of this node is not in the log %v after it was handed in, though %s leads and was within reach all the while: it holds it back, or its disk hangs",
			now.Sub(h.first).Round(time.Second), s.leader))
	}
	if r := &s.refused; r.times > 1 && r.total >= s.limit && !r.since.Before(s.since) {
		add(nil, r.total, r.times, fmt.Sprintf("%s took none of %d commands of this node, which were in order and handed in for %v together, though it leads and was within reach all the while: it refuses them, or can take no more",
			s.leader, r.times, r.total.Round(time.Second)))
		*r = refused{}
	}
	return first
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

// applied notes an entry that was applied here as it came, and looks at its time.
func (s *suspects) applied(leaf state.Leaf, now time.Time) {
	s.mu.Lock()
	x, isNew := s.arrived(leaf, now)
	s.mu.Unlock()
	if isNew {
		s.report(x)
	}
}

func (s *suspects) arrived(leaf state.Leaf, now time.Time) (x Suspicion, isNew bool) {
	if leaf.Origin == s.self {
		delete(s.handed, [sha256.Size]byte(leaf.Command))
		return x, false
	}
	// Without effect its origin's signature may be none, or it came in time before.
	if leaf.Kind != 0 || s.stood(now) {
		return x, false
	}
	p, ok := s.origins[leaf.Origin]
	if !ok || now.Sub(p.last) > s.limit/2 {
		p = &pace{since: now}
		s.origins[leaf.Origin] = p
	}
	p.last = now
	late := time.Duration(now.UnixMilli()-leaf.Time) * time.Millisecond
	p.late = late
	if late <= s.limit {
		p.prompt = now
		return x, false
	}
	if !s.backdated(p, late, now) {
		return x, false
	}
	return s.find(Backdated, leaf.Origin, leaf.Command, late, 1, now, fmt.Sprintf(
		"a command of %s has entered the log %v after the time that it has signed, though it and the leader %s were within reach all the while: its clock is behind, it signs false times, or the leader holds its commands back",
		leaf.Origin, late.Round(time.Second), s.leader))
}

// backdated reports whether nothing but the origin or the leader explains how late a
// command is: the origin's others came regularly since before it was signed, or all of them are late;
// and of the other nodes not more than half are, or it is the own clock that is wrong.
func (s *suspects) backdated(p *pace, late time.Duration, now time.Time) bool {
	if !s.watching() || now.Sub(s.since) < s.limit || now.Sub(p.since) < s.limit {
		return false
	}
	always := now.Sub(later(p.prompt, p.since)) >= s.limit
	since := now.Add(-late)
	if !always && (since.Before(s.since) || since.Before(p.since)) {
		return false
	}
	all, behind := 0, 0
	for _, o := range s.origins {
		if now.Sub(o.last) > s.limit {
			continue
		}
		all++
		if o.late >= late/2 {
			behind++
		}
	}
	return 2*behind <= all
}

// find notes a suspicion, and reports whether it is a new one.
func (s *suspects) find(kind, origin string, command []byte, delay time.Duration, count uint64, now time.Time, text string) (Suspicion, bool) {
	key := fmt.Sprint(kind, " ", s.leader, " ", s.term, " ", origin)
	x, ok := s.found[key]
	if !ok {
		x = &Suspicion{Kind: kind, Leader: s.leader, Term: s.term, Origin: origin, First: now}
		s.found[key] = x
	}
	x.Last, x.Command, x.Text = now, command, text
	x.Count += count
	x.Delay = max(x.Delay, delay)
	return *x, !ok
}

// list returns the suspicions that are shown, oldest first.
func (s *suspects) list() (l []Suspicion) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, x := range s.found {
		l = append(l, *x)
	}
	slices.SortFunc(l, func(a, b Suspicion) int {
		return cmp.Or(a.First.Compare(b.First), cmp.Compare(a.Kind, b.Kind), cmp.Compare(a.Origin, b.Origin))
	})
	return l
}

// leads returns the leader as Raft knows it here, and its term.
func (n *Node) leads() (string, uint64) {
	term := n.raft.CurrentTerm()
	if n.raft.State() == raft.Candidate {
		return "", term
	}
	_, leader := n.raft.LeaderWithID()
	return string(leader), term
}
