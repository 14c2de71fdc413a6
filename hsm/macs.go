package hsm

import (
	"context"

	"github.com/miekg/pkcs11"
)

// lightMAC bounds the message of a light call: one that takes microseconds on a token
// in this machine.
const lightMAC = 2048

// macCall is a light HMAC with a loaded key. A worker may make several at a time.
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

// flyTogether makes the MACs of a worker in one call into the library. Those that come
// to nothing that way fly again, each alone, with all that a call does about errors.
func (d *Device) flyTogether(w *worker) {
	_, _ = attempt(d, w, w.now[0].base().o, func(s *session) (struct{}, error) { return struct{}{}, d.together(s, w.now) })
	for _, p := range w.now {
		if c := p.(*macCall); c.value == nil {
			c.fly(d, w)
		}
	}
}

// together sets the values of the MACs that could be made.
func (d *Device) together(s *session, all []passenger) error {
	defer s.macs.reset()
	var held lease
	var holder *object
	var calls [maxMACs]*macCall
	n := 0
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
		s.macs.add(held.h, c.message)
		calls[n] = c
		n++
	}
	made, err := s.macs.run(s)
	for i, c := range calls[:made] {
		c.value = s.macs.mac(i)
	}
	return err
}
