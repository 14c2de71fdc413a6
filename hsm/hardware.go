package hsm

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"fmt"

	"github.com/miekg/pkcs11"
)

// ImportKey says how others wrap a key for this device: the kind is ImportKind and
// public is what WrapHMAC and WrapSigner take: version 1 ‖ KDF (1: CKD_NULL, the
// last 32 bytes of Z; 2: CKD_SHA256_KDF) ‖ agreement key as a SEC1 uncompressed point. On a
// token that cannot import keys both are empty, and Load calls return ErrUnsupported.
func (d *Device) ImportKey() (kind string, public []byte) {
	if d.imports == nil {
		return "", nil
	}
	return ImportKind, recipient{d.imports.kdf, d.agreement}.bytes()
}

func (d *Device) checkImport(blob []byte) (imported, error) {
	if d.imports == nil {
		return imported{}, fmt.Errorf("%w: this token cannot import keys: %s", ErrUnsupported, d.noImports)
	}
	return parseImport(blob, d.set.curve)
}

// LoadHMAC loads what WrapHMAC wrapped for this device. mac returns the
// HMAC-SHA-256 of a message of up to MaxMAC bytes, 32 bytes, computed in the token;
// the caller wipes it where it is secret. mac loads the key again by itself when it
// has gone from the token (a lost session, or Config.MaxLoaded others used since).
// unload ends the key; it may be called again and waits for the device at most as
// long as a call may take. mac is then refused with ErrInvalid. Both are safe for
// concurrent use. A blob that does not open is ErrInvalid. Other errors:
// ErrUnavailable, ErrUnsupported.
func (d *Device) LoadHMAC(ctx context.Context, blob []byte) (mac func(ctx context.Context, message []byte) ([]byte, error), unload func(), err error) {
	in, err := d.checkImport(blob)
	if err != nil {
		return nil, nil, err
	}
	if in.material != materialHMAC {
		return nil, nil, errImport
	}
	o := &object{blob: in}
	mac = func(ctx context.Context, message []byte) ([]byte, error) {
		if len(message) > MaxMAC {
			return nil, invalidf("HMAC: the message has %d bytes, at most %d are possible", len(message), MaxMAC)
		}
		return d.mac(ctx, o, bytes.Clone(message))
	}
	// A key shorter than it should be shows itself here: the token refuses to use it.
	_, err = use(ctx, d, callOptions{op: "load"}, o, func(s *session, h pkcs11.ObjectHandle) ([]byte, error) {
		got, err := s.hmac(h, nil)
		if isRV(err, pkcs11.CKR_KEY_SIZE_RANGE) {
			err = errImport
		}
		wipe(got)
		return nil, err
	})
	if err != nil {
		d.unload(o)
		return nil, nil, err
	}
	return mac, func() { d.unload(o) }, nil
}

// LoadSigner is LoadHMAC for what WrapSigner wrapped for the same curve. sign
// returns r‖s, each of the curve's coordinate length, over a SHA-256 digest (32
// bytes) on P-256 or a SHA-384 digest (48 bytes) on P-384.
func (d *Device) LoadSigner(ctx context.Context, c ecdh.Curve, blob []byte) (sign func(ctx context.Context, digest []byte) ([]byte, error), unload func(), err error) {
	m, _, err := signerOf(c)
	if err != nil {
		return nil, nil, err
	}
	in, err := d.checkImport(blob)
	if err != nil {
		return nil, nil, err
	}
	if in.material.bare() != m {
		return nil, nil, errImport
	}
	if !d.imports.signers {
		return nil, nil, fmt.Errorf("%w: this token cannot import EC private keys", ErrUnsupported)
	}
	crv, err := m.curve()
	if err != nil {
		return nil, nil, err
	}
	o := &object{blob: in}
	sign = func(ctx context.Context, digest []byte) ([]byte, error) {
		if len(digest) != crv.digest {
			return nil, invalidf("Sign: the digest has %d bytes, %s takes %d", len(digest), crv.name, crv.digest)
		}
		digest = bytes.Clone(digest)
		return use(ctx, d, callOptions{op: "sign"}, o, func(s *session, h pkcs11.ObjectHandle) ([]byte, error) {
			return s.signOn(crv, h, digest)
		})
	}
	_, err = use(ctx, d, callOptions{op: "load"}, o, func(*session, pkcs11.ObjectHandle) ([]byte, error) { return nil, nil })
	if err != nil {
		d.unload(o)
		return nil, nil, err
	}
	return sign, func() { d.unload(o) }, nil
}

// use makes a device call with a loaded object.
func use(ctx context.Context, d *Device, opt callOptions, o *object, f func(*session, pkcs11.ObjectHandle) ([]byte, error)) ([]byte, error) {
	return call(ctx, d, opt, func(s *session) ([]byte, error) {
		return withObject(d, s, o, func(h pkcs11.ObjectHandle) ([]byte, error) { return f(s, h) })
	})
}

// curve of a signing key.
func (m material) curve() (curve, error) {
	switch m.bare() {
	case materialP256:
		return curveOf(ecdh.P256())
	case materialP384:
		return curveOf(ecdh.P384())
	}
	return curve{}, errImport
}
