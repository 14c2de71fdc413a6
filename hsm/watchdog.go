package hsm

import (
	"slices"
	"time"
)

// Bounds of the watchdog's period while calls are under way; in between it is a
// tenth of the call deadline.
const (
	shortestWatch = 5 * time.Millisecond
	longestWatch  = 20 * time.Millisecond
)

// Idle sessions.
const (
	idleCheck = 30 * time.Second // after that a session is looked at before it is used
	idleClose = 5 * time.Minute  // after that it is closed
)

// watch makes the watchdog run while calls are under way. One timer for all of
// them: a timer for each would cost more than some calls. It runs under mu.
func (d *Device) watch() {
	if d.watching {
		return
	}
	d.watching = true
	d.wind(min(max(d.set.timeout/10, shortestWatch), longestWatch))
}

func (d *Device) wind(period time.Duration) {
	if d.watchdog == nil {
		d.watchdog = time.AfterFunc(period, d.patrol)
		return
	}
	d.watchdog.Reset(period)
}

// patrol ends calls past their deadline, those that waited as long for a worker,
// and workers that had nothing to do for long.
func (d *Device) patrol() {
	now := time.Now()
	d.mu.Lock()
	d.watching = false
	hung, waiters := d.overdue(now)
	stale := d.stale(now)
	// A light call that waits for long waits behind one that is not light.
	if len(d.queue) > 0 && d.busy < d.set.maxSessions && now.Sub(d.queue[0].base().since) > shortestWatch {
		d.board()
	}
	d.dispatch()
	d.dismiss(now)
	if d.busy > 0 || len(d.queue) > 0 {
		d.watch()
	} else if len(d.idle) > 0 {
		d.wind(idleClose)
	}
	d.mu.Unlock()
	if hung {
		d.objects.suspect()
		d.markUnhealthy(unavailablef("a call got no answer in time"))
	}
	for _, fl := range stale {
		fl.o.released()
	}
	for _, fl := range slices.Concat(waiters, stale) {
		fl.tell()
	}
}

// overdue abandons the calls past their deadline: their workers and sessions are
// lost, their places go to others. It returns whose callers still wait. It runs
// under mu.
func (d *Device) overdue(now time.Time) (any bool, waiters []*flight) {
	for _, w := range d.workers {
		if len(w.now) == 0 || w.lost || now.Sub(w.since) <= d.set.timeout {
			continue
		}
		for _, p := range w.now {
			if fl := p.base(); !fl.left {
				fl.left = true
				fl.err = unavailablef("%s: no answer within %v", fl.o.op, d.set.timeout)
				waiters = append(waiters, fl)
			}
		}
		any = true
		d.relieve(w)
		w.lost = true
		d.abandoned++
		d.mod.abandoned.Add(1)
	}
	return any, waiters
}

// stale takes the flights out of the queue that waited as long as a call may take,
// and all when as many calls hang as there may be sessions.
// It runs under mu.
func (d *Device) stale(now time.Time) []*flight {
	var all []*flight
	for len(d.queue) > 0 {
		hung := d.abandoned >= d.set.maxSessions
		if !hung && now.Sub(d.queue[0].base().since) <= d.set.timeout {
			break
		}
		fl := d.pop().base()
		fl.left = true
		fl.err = unavailablef("%s: all %d sessions are busy", fl.o.op, d.set.maxSessions)
		if hung {
			fl.err = d.allHang(fl.o.op)
		}
		all = append(all, fl)
	}
	return all
}

// dismiss ends the workers that parked long ago; those parked longest are in front.
// It runs under mu.
func (d *Device) dismiss(now time.Time) {
	for len(d.idle) > 0 && now.Sub(d.idle[0].parked) > idleClose {
		close(d.idle[0].wake)
		d.idle = d.idle[1:]
	}
}
