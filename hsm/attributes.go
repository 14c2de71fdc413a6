package hsm

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/miekg/pkcs11"
)

// KeyAttributes is what the token says of one device key. It is the token's word,
// read through its library, and proves nothing to others.
type KeyAttributes struct {
	Role       string          // "agreement", "signing" or "wrapping"
	Label      string          // CKA_LABEL
	ID         []byte          // CKA_ID
	Public     []byte          // SEC1 uncompressed point; nil for the wrapping key
	Values     map[string]bool // boolean attributes by name, "CKA_SENSITIVE"; one that the token does not know is missing
	Mechanisms []uint          // CKA_ALLOWED_MECHANISMS; nil where the token does not know it
}

// Attributes reads the attributes of the three device keys back, in the order
// agreement, signing, wrapping. Errors: ErrUnavailable.
func (d *Device) Attributes(ctx context.Context) ([]KeyAttributes, error) {
	return call(ctx, d, callOptions{op: "attributes"}, func(s *session) ([]KeyAttributes, error) {
		var all []KeyAttributes
		for _, k := range []struct {
			r         role
			h, public pkcs11.ObjectHandle
		}{{agreementRole, s.keys.agreement, s.keys.agreementPub}, {signingRole, s.keys.signing, s.keys.signingPub}, {wrappingRole, s.keys.wrapping, 0}} {
			a, err := s.describe(k.r, k.h)
			if err == nil && k.public != 0 {
				a.Public, err = s.point(k.public)
			}
			if err != nil {
				return nil, err
			}
			all = append(all, a)
		}
		return all, nil
	})
}

func (s *session) describe(r role, h pkcs11.ObjectHandle) (KeyAttributes, error) {
	a := KeyAttributes{Role: r.name, Values: map[string]bool{}}
	label, err := s.attribute(h, pkcs11.CKA_LABEL)
	if err != nil {
		return a, err
	}
	a.Label = string(label)
	if a.ID, err = s.attribute(h, pkcs11.CKA_ID); err != nil {
		return a, err
	}
	for _, f := range slices.Concat(r.flags(), historyFlags, newerFlags) {
		v, err := s.attribute(h, f.typ)
		if isRV(err, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID) {
			continue
		}
		if err != nil {
			return a, err
		}
		if len(v) != 1 {
			return a, unavailablef("%s of the %s key has %d bytes", attributeName(f.typ), r.name, len(v))
		}
		a.Values[attributeName(f.typ)] = v[0] != 0
	}
	v, err := s.attribute(h, pkcs11.CKA_ALLOWED_MECHANISMS)
	switch {
	case isRV(err, pkcs11.CKR_ATTRIBUTE_TYPE_INVALID):
		return a, nil
	case err != nil:
		return a, err
	case len(v)%8 != 0:
		return a, fmt.Errorf("%w: CKA_ALLOWED_MECHANISMS of the %s key has %d bytes", ErrUnavailable, r.name, len(v))
	}
	for ; len(v) > 0; v = v[8:] {
		a.Mechanisms = append(a.Mechanisms, uint(binary.NativeEndian.Uint64(v)))
	}
	return a, nil
}
