package hsm

import (
	"context"
	"encoding/binary"

	"github.com/miekg/pkcs11"
)

// The counter is a number in a private data object of the token (CKO_DATA, PKCS#11 2.40
// section 4.5), so it stays where it is when the node's disk is put back. Unlike a TPM's it
// does not go back by our doing only: who has the PIN, or the token's own storage, can set
// it back. DESIGN.md says what that means.

// counterLen is the size of the value in bytes, big-endian.
const counterLen = 8

// counterObject returns the template of the counter, or of what it is found by.
func (d *Device) counterObject(value []byte) []*pkcs11.Attribute {
	t := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_DATA),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_APPLICATION, "conclave"),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, d.set.label+"-counter"),
	}
	if value == nil {
		return t
	}
	return append(t, pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true), pkcs11.NewAttribute(pkcs11.CKA_MODIFIABLE, false),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE, value))
}

// counters are the objects of the counter, of which an interrupted increment leaves two.
type counters struct {
	objects []pkcs11.ObjectHandle
	value   uint64 // the highest
}

func (s *session) counters(d *Device) (c counters, err error) {
	if c.objects, err = s.find(d.counterObject(nil)); err != nil {
		return c, err
	}
	for _, o := range c.objects {
		b, err := s.attribute(o, pkcs11.CKA_VALUE)
		if err != nil {
			return c, err
		}
		if len(b) != counterLen {
			return c, unsafef("the counter has %d bytes", len(b))
		}
		c.value = max(c.value, binary.BigEndian.Uint64(b))
	}
	return c, nil
}

// setCounter makes the object with a new value, and then removes those from before.
func (s *session) setCounter(d *Device, old counters, value uint64) error {
	if _, err := s.p11.CreateObject(s.h, d.counterObject(binary.BigEndian.AppendUint64(nil, value))); err != nil {
		return err
	}
	for _, o := range old.objects {
		if err := s.p11.DestroyObject(s.h, o); err != nil {
			return err
		}
	}
	return nil
}

// HasCounter reports whether the token has a counter, which it makes where it is missing
// and the token keeps data objects. Errors: as of Check.
func (d *Device) HasCounter(ctx context.Context) (bool, error) {
	return call(ctx, d, callOptions{op: "find the counter", rw: true, bare: true, once: true}, func(s *session) (bool, error) {
		c, err := s.counters(d)
		if err != nil || len(c.objects) > 0 {
			return err == nil, err
		}
		err = s.setCounter(d, c, 0)
		if isRV(err, pkcs11.CKR_FUNCTION_NOT_SUPPORTED, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID, pkcs11.CKR_ATTRIBUTE_VALUE_INVALID,
			pkcs11.CKR_TEMPLATE_INCONSISTENT, pkcs11.CKR_TOKEN_WRITE_PROTECTED, pkcs11.CKR_DEVICE_MEMORY) {
			return false, nil
		}
		return err == nil, err
	})
}

// Count returns the value of the token's counter, 0 if it was never incremented. Errors: as
// of Check.
func (d *Device) Count(ctx context.Context) (uint64, error) {
	return call(ctx, d, callOptions{op: "read the counter", bare: true}, func(s *session) (uint64, error) {
		c, err := s.counters(d)
		return c.value, err
	})
}

// Increment adds one to the token's counter and returns its value. Cut short it has, or has
// not, done so. Errors: as of Check.
func (d *Device) Increment(ctx context.Context) (uint64, error) {
	return call(ctx, d, callOptions{op: "increment the counter", rw: true, bare: true, once: true}, func(s *session) (uint64, error) {
		c, err := s.counters(d)
		if err != nil {
			return 0, err
		}
		return c.value + 1, s.setCounter(d, c, c.value+1)
	})
}
