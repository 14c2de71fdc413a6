package hsm

import (
	"context"
	"runtime"

	"github.com/miekg/pkcs11"
)

// lightMAC bounds the message of a light call: one that takes microseconds on a token
// in this machine.
const lightMAC = 2048

// maxMACs is how many MACs a worker takes at a time.
const maxMACs = 16

// macCall is a light HMAC with a loaded key. A worker may take several at a time.
type macCall struct {
	carrier[[]byte]
	key     *object
	message []byte
}

// mac computes HMAC-SHA-256 with a loaded key. The message is d's from now on.
func (d *Device) mac(ctx context.Context, key *object, message []byte) ([]byte, error) {
	o := callOptions{op: "hmac", light: len(message) <= lightMAC}
	alone := func(s *session) ([]byte, error) {
		return withObject(d, s, key, func(h pkcs11.ObjectHandle) ([]byte, error) { return s.hmac(h, message) })
	}
	if !o.light {
		return call(ctx, d, o, alone)
	}
	if err := d.admit(ctx, o); err != nil {
		return nil, err
	}
	c := &macCall{carrier: carrier[[]byte]{flight: newFlight(o), f: alone}, key: key, message: message}
	if err := d.await(ctx, c); err != nil {
		return nil, err
	}
	return c.value, nil
}

// flyTogether makes the MACs of a worker one after the other in one session. Those that
// come to nothing that way fly again, each alone, with all that a call does about errors.
func (d *Device) flyTogether(w *worker) {
	_, _ = attempt(d, w, w.now[0].base().o, func(s *session) (struct{}, error) { return struct{}{}, d.together(s, w.now) })
	for _, p := range w.now {
		if c := p.(*macCall); c.value == nil {
			c.fly(d, w)
		}
	}
}

// together sets the values of the MACs that could be made. It stops at the first error of
// the session.
func (d *Device) together(s *session, all []passenger) error {
	var held lease
	var holder *object
	for _, p := range all {
		c := p.(*macCall)
		if c.key != holder {
			l, err := d.lease(s, c.key)
			if err != nil {
				continue // its own flight says why
			}
			defer d.unlease(s, c.key, l)
			held, holder = l, c.key
		}
		var err error
		if c.value, err = s.hmac(held.h, c.message); err != nil {
			return err
		}
	}
	return nil
}

// A worker that has many calls waiting stays on its thread, and so with its memory and
// its caches: a token in this machine is a third faster for it. One that is woken for
// single calls must not: switching to a thread of its own costs more than the call.
const (
	crowd = 3  // calls at a time that bind the worker to its thread
	quiet = 64 // times with fewer that set it free
)

// settle binds the worker to its thread or sets it free.
func (w *worker) settle() {
	if len(w.now) < crowd {
		if w.calm++; w.calm > quiet {
			w.free()
		}
		return
	}
	w.calm = 0
	if !w.bound {
		w.bound = true
		runtime.LockOSThread()
	}
}

func (w *worker) free() {
	if w.bound {
		w.bound = false
		runtime.UnlockOSThread()
	}
}
