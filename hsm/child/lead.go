package child

import (
	"sync"
	"time"
)

// lead is the right to read the next frame. The leader keeps it while it makes light
// calls. One that turns out to take long loses it to another worker: nobody must wait
// for a call that hangs.
type lead struct {
	stolen func() // called after a worker has lost the lead

	mu     sync.Mutex
	free   sync.Cond
	holder *worker
	timer  *time.Timer
	armed  bool
	ended  bool
}

// worker is a goroutine of the child.
type worker struct {
	calls uint64 // under lead.mu: counts the begun ones and the done ones, so odd within one
	seen  uint64 // under lead.mu: calls at the last look
}

// patience is how long a leader may be in one call. It loses the lead after once or
// twice that.
const patience = 2 * time.Millisecond

func (l *lead) init(stolen func()) {
	l.stolen = stolen
	l.free.L = &l.mu
	l.timer = time.AfterFunc(time.Hour, l.look)
	l.timer.Stop()
}

// take waits for the lead, unless w has it.
func (l *lead) take(w *worker) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.holder != nil && l.holder != w {
		l.free.Wait()
	}
	l.holder = w
}

// leave gives the lead to another worker.
func (l *lead) leave(w *worker) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.holder == w {
		l.holder = nil
		l.free.Signal()
	}
}

// begin and done are around a call that the leader makes. done reports whether it
// still is the leader.
func (l *lead) begin(w *worker) {
	l.mu.Lock()
	defer l.mu.Unlock()
	w.calls++
	if !l.armed && !l.ended {
		l.armed = true
		l.timer.Reset(patience)
	}
}

func (l *lead) done(w *worker) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	w.calls++
	return l.holder == w
}

// look takes the lead from a worker that is in the same call as at the last look.
func (l *lead) look() {
	l.mu.Lock()
	w := l.holder
	idle := w == nil || w.calls%2 == 0 && w.calls == w.seen
	stuck := w != nil && w.calls%2 == 1 && w.calls == w.seen
	if w != nil {
		w.seen = w.calls
	}
	if stuck {
		l.holder = nil
		l.free.Signal()
	}
	l.armed = !idle && !stuck && !l.ended
	if l.armed {
		l.timer.Reset(patience)
	}
	l.mu.Unlock()
	if stuck {
		l.stolen()
	}
}

func (l *lead) end() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ended = true
	l.timer.Stop()
}
