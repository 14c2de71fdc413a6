package hsm

import (
	"bytes"
	"fmt"
	"strings"
	"time"
	"unsafe"

	"github.com/miekg/pkcs11"
)

// session is one PKCS#11 session with the handles of the device keys in it. It
// belongs to one goroutine at a time: SoftHSM crashes when goroutines share one.
// The handles live and die with the session, so nothing stale outlives it.
type session struct {
	p11   *pkcs11.Ctx
	fn    functions
	h     pkcs11.SessionHandle
	slot  uint
	gen   uint64 // of the module
	epoch uint64 // of the device
	used  time.Time
	keys  handles
	curve curve

	hook    func(op string) error          // tests: runs inside some calls; may be nil
	victims map[string]pkcs11.ObjectHandle // loaded keys for the attacks to try
}

// handles are the object handles of the device keys.
type handles struct {
	agreement, agreementPub pkcs11.ObjectHandle
	signing, signingPub     pkcs11.ObjectHandle
	wrapping                pkcs11.ObjectHandle
}

// findSlot returns the slot of the one token that matches the URI.
func findSlot(p11 *pkcs11.Ctx, u *URI) (uint, pkcs11.TokenInfo, error) {
	slots, err := p11.GetSlotList(true)
	if err != nil {
		return 0, pkcs11.TokenInfo{}, classify("C_GetSlotList", err)
	}
	var there []string
	var found []uint
	var info pkcs11.TokenInfo
	var broken error
	for _, slot := range slots {
		ti, err := p11.GetTokenInfo(slot)
		if err != nil { // another slot's trouble, or this token's
			broken = err
			continue
		}
		if ti.Flags&pkcs11.CKF_TOKEN_INITIALIZED == 0 {
			continue
		}
		if u.matches(slot, ti) {
			found = append(found, slot)
			info = ti
		} else {
			there = append(there, fmt.Sprintf("%q (serial %s)", clean(ti.Label), shown(ti.SerialNumber)))
		}
	}
	switch {
	case len(found) == 1:
		return found[0], info, nil
	case len(found) > 1:
		return 0, info, fmt.Errorf("%w: %d tokens match the URI: add the serial", ErrTokenNotFound, len(found))
	case broken != nil:
		return 0, info, fmt.Errorf("%w: no token matches the URI and a slot cannot be read: %w", ErrUnavailable, broken)
	case len(there) == 0:
		return 0, info, fmt.Errorf("%w: the library shows no initialised token (SoftHSM: check SOFTHSM2_CONF)", ErrTokenNotFound)
	}
	return 0, info, fmt.Errorf("%w: no token matches %s; there are: %s: correct token or serial in the URI", ErrTokenNotFound, u, strings.Join(there, ", "))
}

func (u *URI) matches(slot uint, ti pkcs11.TokenInfo) bool {
	eq := func(want, got string) bool { return want == "" || want == clean(got) }
	return eq(u.Token, ti.Label) && eq(u.Manufacturer, ti.ManufacturerID) && eq(u.Model, ti.Model) &&
		eq(u.Serial, ti.SerialNumber) && (u.SlotID == nil || *u.SlotID == slot)
}

// clean trims the padding of a fixed-width PKCS#11 string.
func clean(s string) string { return strings.TrimRight(s, " \x00") }

// openSession opens a session, logs in and finds the keys. It runs on a worker,
// inside the gate. rw opens a session that may change token objects.
func (d *Device) openSession(rw, keys bool) (*session, error) {
	slot, _, err := findSlot(d.mod.p11, d.set.uri)
	if err != nil {
		return nil, err
	}
	flags := uint(pkcs11.CKF_SERIAL_SESSION)
	if rw {
		flags |= pkcs11.CKF_RW_SESSION
	}
	h, err := d.mod.p11.OpenSession(slot, flags)
	if err != nil {
		return nil, fmt.Errorf("C_OpenSession: %w", err)
	}
	s := &session{p11: d.mod.p11, fn: d.mod.fn, h: h, slot: slot, gen: d.mod.gen, curve: d.set.curve}
	err = d.login(s)
	if err == nil && keys {
		err = d.bindKeys(s)
	}
	if err != nil {
		s.close()
		return nil, err
	}
	return s, nil
}

func (s *session) close() { _ = s.p11.CloseSession(s.h) } // a session that cannot be closed is lost anyway

// login logs the user in. The login belongs to the token, so another session
// may have done it already. A refused PIN is remembered and never sent again.
func (d *Device) login(s *session) error {
	d.loginMu.Lock()
	defer d.loginMu.Unlock()
	si, err := s.p11.GetSessionInfo(s.h)
	if err != nil {
		return fmt.Errorf("C_GetSessionInfo: %w", err)
	}
	if si.State == pkcs11.CKS_RO_USER_FUNCTIONS || si.State == pkcs11.CKS_RW_USER_FUNCTIONS {
		return nil
	}
	if d.pin.refused != nil {
		if err := d.pin.renew(); err != nil {
			return err
		}
	}
	pin := d.pin.now.Reveal()
	// The string shares the locked memory, so that no copy stays on the Go heap.
	err = s.p11.Login(s.h, pkcs11.CKU_USER, unsafe.String(unsafe.SliceData(pin), len(pin)))
	switch {
	case err == nil, isRV(err, pkcs11.CKR_USER_ALREADY_LOGGED_IN):
		return nil
	case isPIN(err):
		return d.pin.refuse(err)
	}
	return fmt.Errorf("C_Login: %w", err)
}

// bindKeys finds the device keys and makes sure that they are those that the
// device was opened with: a token that was swapped must not slip in.
func (d *Device) bindKeys(s *session) error {
	if err := s.findKeys(d.set.label); err != nil {
		return err
	}
	if d.agreement == nil {
		return nil // Open is about to learn them
	}
	for _, k := range []struct {
		pub  pkcs11.ObjectHandle
		want []byte
	}{{s.keys.agreementPub, d.agreement.Bytes()}, {s.keys.signingPub, d.signingPoint}} {
		got, err := s.point(k.pub)
		if err != nil {
			return err
		}
		if !bytes.Equal(got, k.want) {
			return unavailablef("the token now holds other keys than when the device was opened")
		}
	}
	return nil
}

// find returns the handles of all objects that match.
func (s *session) find(template []*pkcs11.Attribute) ([]pkcs11.ObjectHandle, error) {
	if err := s.p11.FindObjectsInit(s.h, template); err != nil {
		return nil, fmt.Errorf("C_FindObjectsInit: %w", err)
	}
	var all []pkcs11.ObjectHandle
	for {
		got, _, err := s.p11.FindObjects(s.h, 16)
		if err != nil {
			_ = s.p11.FindObjectsFinal(s.h)
			return nil, fmt.Errorf("C_FindObjects: %w", err)
		}
		if len(got) == 0 {
			break
		}
		all = append(all, got...)
	}
	if err := s.p11.FindObjectsFinal(s.h); err != nil {
		return nil, fmt.Errorf("C_FindObjectsFinal: %w", err)
	}
	return all, nil
}

// attribute reads one attribute.
func (s *session) attribute(o pkcs11.ObjectHandle, typ uint) ([]byte, error) {
	got, err := s.p11.GetAttributeValue(s.h, o, []*pkcs11.Attribute{{Type: typ}})
	if err != nil {
		return nil, fmt.Errorf("C_GetAttributeValue: %w", err)
	}
	return got[0].Value, nil
}
