package hsm

import (
	"errors"
	"time"

	"github.com/miekg/pkcs11"
)

func uninitialized(err error) bool { return isRV(err, pkcs11.CKR_CRYPTOKI_NOT_INITIALIZED) }

// take returns the session for a call: that of the worker, or a new one. It runs
// inside the gate. A worker has one session at a time.
func (d *Device) take(w *worker, o callOptions, now time.Time) (*session, error) {
	special := o.rw || o.bare || o.own
	if s := w.s; s != nil {
		if !special && !o.fresh && d.current(s) && (now.Sub(s.used) < idleCheck || s.alive()) {
			s.used = now
			return s, nil
		}
		d.drop(s)
		w.s = nil
	}
	epoch := d.epoch.Load()
	s, err := d.openSession(o.rw, !o.bare)
	if err != nil {
		return nil, d.sinceOpen(err)
	}
	s.epoch, s.used = epoch, now
	if !special {
		w.s = s
	}
	return s, nil
}

// alive reports whether a session that was idle is still logged in and knows its keys.
func (s *session) alive() bool {
	si, err := s.p11.GetSessionInfo(s.h)
	if err != nil || si.State != pkcs11.CKS_RO_USER_FUNCTIONS && si.State != pkcs11.CKS_RW_USER_FUNCTIONS {
		return false
	}
	_, err = s.attribute(s.keys.signing, pkcs11.CKA_ID)
	return err == nil
}

// sinceOpen turns an error that says that library, token or keys are not there into
// ErrUnavailable once the device was open: then they were there before.
func (d *Device) sinceOpen(err error) error {
	if d.agreement == nil || !(errors.Is(err, ErrTokenNotFound) || errors.Is(err, ErrNotProvisioned) || errors.Is(err, ErrUnsafeToken) || errors.Is(err, ErrModule)) {
		return err
	}
	return unavailablef("the token, its keys or what the library needs have gone: %v", err)
}

// current reports whether a session is of the present initialisation and was not
// voided since it was opened. It runs inside the gate.
func (d *Device) current(s *session) bool {
	return s.gen == d.mod.gen && s.epoch == d.epoch.Load()
}

// drop closes a session unless its handle belongs to an earlier initialisation
// of the library: the number may be somebody else's session now.
func (d *Device) drop(s *session) {
	if s.gen == d.mod.gen {
		s.close()
	}
}

// give ends the use of a session. After any error it is closed: an operation may
// still be active in it. It runs inside the gate.
func (d *Device) give(w *worker, s *session, err error) {
	if s != w.s || err != nil {
		d.drop(s)
	}
	if err != nil {
		w.s = nil
	}
}

// flush voids all sessions that are open now: when one is lost, so are they.
func (d *Device) flush() { d.epoch.Add(1) }
