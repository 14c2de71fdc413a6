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
	wake chan passenger // one at a time while parked; nil ends the worker

	// Of the goroutine alone.
	s *session // nil until the first call

	// Under Device.mu.
	now    passenger // flying; nil when parked
	parked time.Time
	told   []*flight // landed; their callers are to be told
}

// burst is how many light calls may wait for one worker on a token that makes them
// one after the other anyway.
const burst = 64

// batch is how many callers are told of their results at a time. A sleeping thread
// has to be woken for each news, which takes as long as a light call.
const batch = 16

// enqueue gives the flight to a worker, now or when one is free.
func (d *Device) enqueue(p passenger) error {
	fl := p.base()
	d.mu.Lock()
	var err error
	switch {
	case d.closed:
		err = unavailablef("%s: the device is closed", fl.o.op)
	case d.abandoned >= d.set.maxSessions:
		err = d.allHang(fl.o.op)
	}
	if err != nil {
		d.mu.Unlock()
		return err
	}
	fl.since = time.Now()
	if len(d.queue) == 0 && d.admits(fl) {
		d.board(p)
	} else {
		d.queue = append(d.queue, p)
	}
	d.watch()
	d.mu.Unlock()
	return nil
}

func (d *Device) allHang(op string) error {
	return unavailablef("%s: %d calls hang in the device; no more until one returns", op, d.abandoned)
}

// admits reports whether a call may go to one more worker. Light calls to a token
// that does not make them side by side stay with the worker that makes some now: a
// second would only contend with it for the token's locks. It runs under mu.
func (d *Device) admits(fl *flight) bool {
	if d.busy >= d.set.maxSessions {
		return false
	}
	return !fl.o.light || !d.serial || d.light == 0 || len(d.queue) > burst
}

// board gives the flight to the worker that parked last, or to a new one. It runs
// under mu.
func (d *Device) board(p passenger) {
	var w *worker
	if n := len(d.idle); n > 0 {
		w = d.idle[n-1]
		d.idle = d.idle[:n-1]
		d.assign(w, p)
		w.wake <- p // has room: a parked worker gets one
		return
	}
	w = &worker{wake: make(chan passenger, 1)}
	d.workers = append(d.workers, w)
	d.assign(w, p)
	go d.work(w, p)
}

func (d *Device) assign(w *worker, p passenger) {
	fl := p.base()
	fl.phase = flying
	fl.since = time.Now()
	w.now = p
	d.busy++
	if fl.o.light {
		d.light++
	}
}

// relieve is the reverse of assign.
func (d *Device) relieve(fl *flight) {
	d.busy--
	if fl.o.light {
		d.light--
	}
}

// dispatch starts what waits as far as the limits allow. It runs under mu.
func (d *Device) dispatch() {
	for len(d.queue) > 0 && d.admits(d.queue[0].base()) {
		d.board(d.pop())
	}
}

func (d *Device) pop() passenger {
	p := d.queue[0]
	d.queue[0] = nil
	d.queue = d.queue[1:]
	return p
}

// work is the worker goroutine.
func (d *Device) work(w *worker, p passenger) {
	for p != nil {
		p = d.land(w, p, p.fly(d, w))
	}
	d.retire(w)
}

// land hands the result over and returns the next flight, nil to end the worker.
func (d *Device) land(w *worker, p passenger, err error) passenger {
	fl := p.base()
	d.mu.Lock()
	left, late := fl.left, fl.late
	fl.phase = landed
	w.now = nil
	var next passenger
	if late { // the watchdog has given this worker up, and its place to others
		d.abandoned--
		d.mod.abandoned.Add(-1)
	} else {
		fl.err = err
		d.relieve(fl)
		if len(d.queue) > 0 && d.admits(d.queue[0].base()) {
			next = d.pop()
			d.assign(w, next)
			d.dispatch()
		} else if !d.closed {
			w.parked = fl.since
			d.idle = append(d.idle, w)
		}
	}
	stay := !late && !d.closed || next != nil
	if !left {
		if w.told == nil {
			w.told = make([]*flight, 0, batch)
		}
		w.told = append(w.told, fl)
	}
	var news []*flight
	if !d.delays(w, next) {
		news, w.told = w.told, nil
	}
	d.mu.Unlock()
	if left {
		p.wipe()
	}
	tell(news)
	if next == nil && stay {
		next = <-w.wake
	}
	return next
}

// delays reports whether news may wait until more have come together: on a token
// that makes light calls one after the other, while others wait for theirs. Half of
// those under way are told at a time, so that the worker has the other half to do
// meanwhile. It runs under mu.
func (d *Device) delays(w *worker, next passenger) bool {
	return d.serial && next != nil && next.base().o.light && len(w.told) < min(batch, 3*len(d.queue))
}

// tell wakes the caller of the first flight and leaves the others to it: waking takes
// time that a worker has better uses for.
func tell(news []*flight) {
	if len(news) > 0 {
		news[0].done <- news[1:]
	}
}

// leave is called by a caller whose context has ended. It reports whether that
// comes before the result.
func (d *Device) leave(p passenger) bool {
	fl := p.base()
	d.mu.Lock()
	if fl.phase == landed || fl.left {
		d.mu.Unlock()
		tell(<-fl.done) // there or on its way
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
