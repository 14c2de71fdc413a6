package hsm

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"math"

	"github.com/miekg/pkcs11"
)

// Counter is a number in a private data object of the token (CKO_DATA, PKCS#11 2.40
// section 4.5), so it stays where it is when the node's disk is put back. Unlike a TPM's it
// goes back by our doing, too: who has the PIN, or the token's own storage, can set
// it back. DESIGN.md says what that means.
type Counter struct {
	d     *Device
	label string
}

// counterLen is the size of the value in bytes, big-endian.
const counterLen = 8

// maxLeft is how many former objects may stay where the token does not let go of them.
const maxLeft = 4

// Counter returns the counter for a purpose, such as a node of a cluster: a token that serves
// another has another one there.
func (d *Device) Counter(purpose string) *Counter {
	h := sha256.Sum256([]byte(purpose))
	return &Counter{d, d.set.label + "-counter-" + hex.EncodeToString(h[:8])}
}

// object returns the template of the counter, or of what it is found by. It is private, so nobody
// makes or changes it without the PIN.
func (c *Counter) object(value []byte) []*pkcs11.Attribute {
	t := []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_DATA),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, true),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_APPLICATION, "conclave"),
		pkcs11.NewAttribute(pkcs11.CKA_LABEL, c.label),
	}
	if value == nil {
		return t
	}
	return append(t, pkcs11.NewAttribute(pkcs11.CKA_MODIFIABLE, false), pkcs11.NewAttribute(pkcs11.CKA_VALUE, value))
}

// counts are the objects of a counter, of which an interrupted increment leaves two.
type counts struct {
	objects []pkcs11.ObjectHandle
	value   uint64 // the highest
}

func (c *Counter) read(s *session) (n counts, err error) {
	if n.objects, err = s.find(c.object(nil)); err != nil {
		return n, err
	}
	for _, o := range n.objects {
		b, err := s.attribute(o, pkcs11.CKA_VALUE)
		if err != nil {
			return n, err
		}
		if len(b) != counterLen {
			return n, unsafef("the counter has %d bytes", len(b))
		}
		n.value = max(n.value, binary.BigEndian.Uint64(b))
	}
	return n, nil
}

// write makes the object with a new value, and then removes those from before. Some may stay: the
// highest counts.
func (c *Counter) write(s *session, old counts, value uint64) error {
	if _, err := s.p11.CreateObject(s.h, c.object(binary.BigEndian.AppendUint64(nil, value))); err != nil {
		return err
	}
	for i, o := range old.objects {
		if err := s.p11.DestroyObject(s.h, o); err != nil && len(old.objects)-i > maxLeft {
			return err
		}
	}
	return nil
}

// Exists reports whether the token has the counter, which it makes where it is missing and the
// token lets the user make and remove data objects. Errors: as of Check.
func (c *Counter) Exists(ctx context.Context) (bool, error) {
	return call(ctx, c.d, callOptions{op: "find the counter", rw: true, once: true}, func(s *session) (bool, error) {
		n, err := c.read(s)
		if err != nil || len(n.objects) > 0 {
			return err == nil, err
		}
		trial := &Counter{c.d, c.label + "-trial"}
		left, err := trial.read(s)
		if err == nil && len(left.objects) == 0 {
			if err = trial.write(s, counts{}, 0); unoffered(err) {
				return false, nil
			}
			if err == nil {
				left, err = trial.read(s)
			}
		}
		if err != nil {
			return false, err
		}
		for _, o := range left.objects {
			if err := s.p11.DestroyObject(s.h, o); unoffered(err) {
				return false, nil
			} else if err != nil {
				return false, err
			}
		}
		err = c.write(s, n, 0)
		return err == nil, err
	})
}

// unoffered reports whether the token does not offer the service to this user, so that asking again
// does not help.
func unoffered(err error) bool {
	return isRV(err, pkcs11.CKR_FUNCTION_NOT_SUPPORTED, pkcs11.CKR_FUNCTION_REJECTED, pkcs11.CKR_ACTION_PROHIBITED, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID,
		pkcs11.CKR_ATTRIBUTE_VALUE_INVALID, pkcs11.CKR_ATTRIBUTE_READ_ONLY, pkcs11.CKR_TEMPLATE_INCONSISTENT, pkcs11.CKR_TEMPLATE_INCOMPLETE,
		pkcs11.CKR_TOKEN_WRITE_PROTECTED, pkcs11.CKR_DEVICE_MEMORY)
}

// Count returns the counter's value, 0 if it was never incremented. Errors: as of Check.
func (c *Counter) Count(ctx context.Context) (uint64, error) {
	return call(ctx, c.d, callOptions{op: "read the counter"}, func(s *session) (uint64, error) {
		n, err := c.read(s)
		return n.value, err
	})
}

// Increment adds one to the counter and returns its value. Cut short it has, or has not, done
// so. Errors: as of Check.
func (c *Counter) Increment(ctx context.Context) (uint64, error) {
	return call(ctx, c.d, callOptions{op: "increment the counter", rw: true, once: true}, func(s *session) (uint64, error) {
		n, err := c.read(s)
		if err != nil {
			return 0, err
		}
		if n.value == math.MaxUint64 {
			return 0, unsafef("the counter is at its end")
		}
		return n.value + 1, c.write(s, n, n.value+1)
	})
}
