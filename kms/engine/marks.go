package engine

import (
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/state"
)

// checkpointEvery is how often a log that grows gets a checkpoint.
const checkpointEvery = 10 * time.Second

// keepMarks is how many of the latest marks a node can hold others' cosignatures against.
const keepMarks = 16

// Marks finds the places in the cluster log that nodes cosign: where a tick takes the
// cluster's clock over a multiple of ten seconds, if the log has grown before by more than
// ticks and what checkpoints bring themselves. All nodes find the same places, so their
// cosignatures are of the same heads. It is safe for concurrent use.
type Marks struct {
	mu     sync.Mutex
	clock  int64 // of the state before
	dirty  bool
	since  time.Time // when the log grew first after the last mark
	period int64     // ms
	last   *mark     // to be cosigned here
	newest *mark
	past   []audit.Head
}

// mark is a place in the cluster log that is to be cosigned.
type mark struct {
	st    *state.State
	since time.Time
}

// NewMarks returns Marks that know nothing yet.
func NewMarks() *Marks {
	return &Marks{dirty: true, since: time.Now(), period: checkpointEvery.Milliseconds()}
}

// Applied is told of every command in the order of the log, with the state after it.
func (m *Marks) Applied(st *state.State, r state.Result) {
	leaf, err := state.ParseLeaf(r.Leaf)
	if err != nil {
		return // an entry that has none
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	before := m.clock
	m.clock = st.Clock()
	switch leaf.Type {
	case state.TypeTick:
		if m.dirty && before > 0 && before/m.period < m.clock/m.period {
			m.last, m.dirty = &mark{st, m.since}, false
			m.newest = m.last
		}
	case state.TypeSubmitCheckpoint, state.TypeCosign:
	default:
		if !m.dirty {
			m.dirty, m.since = true, time.Now()
		}
	}
}

// wanted returns the latest mark that is not cosigned here.
func (m *Marks) wanted() (mark, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.last == nil {
		return mark{}, false
	}
	return *m.last, true
}

// latest returns the latest mark, cosigned here or not.
func (m *Marks) latest() (mark, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.newest == nil {
		return mark{}, false
	}
	return *m.newest, true
}

// hashed remembers a mark's head. Where hashing takes long, marks that are further
// apart do: their period is a multiple by a power of two, so that nodes of different
// speed meet at some.
func (m *Marks) hashed(h audit.Head, took time.Duration) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.period = checkpointEvery.Milliseconds()
	for m.period < 20*took.Milliseconds() {
		m.period *= 2
	}
	if m.past = append(m.past, h); len(m.past) > keepMarks {
		m.past = m.past[1:]
	}
}

// done says that a mark needs this node no more.
func (m *Marks) done(size uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.last != nil && m.last.st.LogSize() <= size {
		m.last = nil
	}
}

// contradicts reports whether another head stands where this node has found one.
func (m *Marks) contradicts(h audit.Head) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, own := range m.past {
		if own.Size == h.Size && !own.Equal(h) {
			return true
		}
	}
	return false
}
