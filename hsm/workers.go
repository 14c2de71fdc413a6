package hsm

import (
	"context"
	"slices"
	"time"
)

// worker is a goroutine with a session. It makes one call after another as long as
// some wait, and then parks. A token in this machine answers in the time that it
// takes to wake a thread, so a goroutine for each call would cost as much again.
type worker struct {
	wake chan struct{} // a parked worker has calls again; closed to end it

	// Of the goroutine alone.
	s     *session // nil until the first call
	bound bool     // to its thread
	calm  int      // flights in a row with few calls, while bound

	// Under Device.mu. A worker that flies reads now and since without it: nobody else
	// changes them meanwhile.
	now    []passenger // flying; empty when parked; more than one are macCalls
	since  time.Time   // when they took off
	lost   bool        // given up by the watchdog, and its place to others
	parked time.Time
}

// burst is how many light calls may wait for one worker on a token that makes them
// one after the other anyway.
const burst = 64

// enqueue gives the flight to a worker, now or when one is free.
func (d *Device) enqueue(p passenger) error {
	fl := p.base()
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.closed:
		return unavailablef("%s: the device is closed", fl.o.op)
	case d.abandoned >= d.set.maxSessions:
		return d.allHang(fl.o.op)
	}
	fl.since = time.Now()
	d.queue = append(d.queue, p)
	d.dispatch()
	d.watch()
	return nil
}

func (d *Device) allHang(op string) error {
	return unavailablef("%s: %d calls hang in the device; no more until one returns", op, d.abandoned)
}

// dispatch starts what waits as far as the limits allow. It runs under mu.
func (d *Device) dispatch() {
	for d.admits() {
		d.board()
	}
}

// admits reports whether the first in the queue may go to one more worker. Light calls
// to a token that does not make them side by side stay with the worker that makes some
// now: a second would only contend with it for the token's locks. It runs under mu.
func (d *Device) admits() bool {
	if len(d.queue) == 0 || d.busy >= d.set.maxSessions {
		return false
	}
	return !d.queue[0].base().o.light || !d.serial || d.light == 0 || len(d.queue) > burst
}

// board gives what waits to the worker that parked last, or to a new one. It runs
// under mu.
func (d *Device) board() {
	if n := len(d.idle); n > 0 {
		w := d.idle[n-1]
		d.idle = d.idle[:n-1]
		d.assign(w)
		w.wake <- struct{}{} // has room: a parked worker gets one
		return
	}
	w := &worker{wake: make(chan struct{}, 1)}
	d.workers = append(d.workers, w)
	d.assign(w)
	go d.work(w)
}

// assign gives the worker the first call of the queue. On a token that makes light
// calls one after the other it takes more of them along, half of those that wait: the
// callers of one half use their results while the worker sees to the other. It runs
// under mu.
func (d *Device) assign(w *worker) {
	w.since = time.Now()
	w.now = append(w.now, d.pop())
	if _, ok := w.now[0].(*macCall); ok && d.serial {
		for n := min(maxMACs, (len(d.queue)+1)/2); len(w.now) < n; {
			if _, ok := d.queue[0].(*macCall); !ok {
				break
			}
			w.now = append(w.now, d.pop())
		}
	}
	for _, p := range w.now {
		p.base().phase = flying
	}
	d.busy++
	if w.light() {
		d.light++
	}
}

func (w *worker) light() bool { return w.now[0].base().o.light }

// relieve is the reverse of assign. It runs under mu.
func (d *Device) relieve(w *worker) {
	d.busy--
	if w.light() {
		d.light--
	}
}

func (d *Device) pop() passenger {
	p := d.queue[0]
	d.queue[0] = nil
	d.queue = d.queue[1:]
	return p
}

// work is the worker goroutine.
func (d *Device) work(w *worker) {
	for more := true; more; {
		w.settle()
		if len(w.now) > 1 {
			d.flyTogether(w)
		} else {
			w.now[0].fly(d, w)
		}
		more = d.land(w)
	}
	w.free()
	d.retire(w)
}

// land hands the results over and waits for the next flights. It returns false to end
// the worker.
func (d *Device) land(w *worker) bool {
	d.mu.Lock()
	if w.lost {
		d.abandoned--
		d.mod.abandoned.Add(-1)
	} else {
		d.relieve(w)
	}
	var told *flight // the first of a chain
	var left []passenger
	end := &told
	for i, p := range w.now {
		fl := p.base()
		fl.phase = landed
		if fl.left {
			left = append(left, p)
		} else {
			fl.err = fl.outcome
			*end, end = fl, &fl.next
		}
		w.now[i] = nil
	}
	w.now = w.now[:0]
	again, stay := false, !w.lost && !d.closed
	switch {
	case !w.lost && d.admits():
		d.assign(w)
		d.dispatch()
		again = true
	case stay:
		w.parked = w.since
		d.idle = append(d.idle, w)
	}
	d.mu.Unlock()
	for _, p := range left {
		p.wipe()
	}
	told.tell()
	if again || !stay {
		return again
	}
	_, more := <-w.wake
	return more
}

// tell wakes the caller of a flight and leaves the rest of the chain to it: waking takes
// time that a worker has better uses for.
func (fl *flight) tell() {
	if fl != nil {
		fl.done <- fl.next
	}
}

// leave is called by a caller whose context has ended. It reports whether that
// comes before the result.
func (d *Device) leave(p passenger) bool {
	fl := p.base()
	d.mu.Lock()
	if fl.phase == landed || fl.left {
		d.mu.Unlock()
		(<-fl.done).tell() // there or on its way
		return false
	}
	fl.left = true
	queued := fl.phase == waiting
	if queued {
		d.queue = slices.DeleteFunc(d.queue, func(q passenger) bool { return q == p })
	}
	d.mu.Unlock()
	if queued {
		fl.o.released()
	}
	return true
}

// retire ends a worker. The last one after Close takes the device down.
func (d *Device) retire(w *worker) {
	if w.s != nil {
		ctx, cancel := context.WithTimeout(context.Background(), d.set.timeout)
		if d.mod.gate.Acquire(ctx, 1) == nil {
			d.drop(w.s)
			d.mod.gate.Release(1)
		}
		cancel()
	}
	d.mu.Lock()
	d.workers = slices.DeleteFunc(d.workers, func(o *worker) bool { return o == w })
	last := d.lastGone()
	d.mu.Unlock()
	if last {
		d.dismantle()
	}
}

// lastGone reports, once, that the device is closed and nothing of it is inside the
// library. It runs under mu.
func (d *Device) lastGone() bool {
	if !d.closed || len(d.workers) > 0 || d.holds > 0 || d.gone {
		return false
	}
	d.gone = true
	return true
}

// hold keeps the module for work outside of a call; false when the device is closed.
func (d *Device) hold() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return false
	}
	d.holds++
	return true
}

func (d *Device) unhold() {
	d.mu.Lock()
	d.holds--
	last := d.lastGone()
	d.mu.Unlock()
	if last {
		d.dismantle()
	}
}
