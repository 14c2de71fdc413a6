package keyring

import (
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/sha256"
	"encoding/asn1"
	"errors"
	"math/big"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
)

// Hardware is a device that takes keys for use inside it alone, wrapped as an
// Importer of its kind does. The functions that a load returns are safe for
// concurrent use and load the key again by themselves when the device has lost
// it; unload may be called more than once. An error in whose chain a method
// Invalid() bool returns true says that the blob does not open, one with
// Unsupported() bool that the device cannot do that; any other, that it failed.
type Hardware interface {
	// LoadHMAC loads a key of HMAC-SHA-256. mac takes messages of up to
	// MaxDeviceMAC bytes and returns 32.
	LoadHMAC(ctx context.Context, blob []byte) (mac func(ctx context.Context, message []byte) ([]byte, error), unload func(), err error)
	// LoadSigner loads an ECDSA key. sign takes a SHA-256 digest on P-256, a
	// SHA-384 digest on P-384, and returns r‖s.
	LoadSigner(ctx context.Context, c ecdh.Curve, blob []byte) (sign func(ctx context.Context, digest []byte) ([]byte, error), unload func(), err error)
}

// Generator is a Hardware that makes keys inside itself and wraps them there for
// other devices of its own import kind, itself among them. What it returns is as
// of Hardware.
type Generator interface {
	// Generates says which of the two work.
	Generates() (hmac, signer bool)
	GenerateHMAC(ctx context.Context, recipients [][]byte) (blobs [][]byte, mac func(ctx context.Context, message []byte) ([]byte, error), unload func(), err error)
	GenerateSigner(ctx context.Context, c ecdh.Curve, recipients [][]byte) (blobs [][]byte, public *ecdsa.PublicKey,
		sign func(ctx context.Context, digest []byte) ([]byte, error), unload func(), err error)
}

// Rewrapper is a Hardware that wraps a key, given as its own blob, for another
// device of its import kind, without the key leaving it.
type Rewrapper interface {
	Rewrap(ctx context.Context, blob, recipient []byte) ([]byte, error)
}

// Importer wraps keys in this process for the devices of an import kind: public
// is what such a device publishes, label is nil.
type Importer struct {
	WrapHMAC   func(public []byte, key *secret.Bytes, label []byte) ([]byte, error)
	WrapSigner func(public []byte, c ecdh.Curve, scalar *secret.Bytes, label []byte) ([]byte, error)
}

// errNoHardware is the answer of a node whose device cannot have keys of
// protection hardware.
var errNoHardware error = &kms.Error{Kind: kms.Unavailable, Msg: "the device of this node cannot use keys of protection hardware",
	Fix: "use another node of the keyring's residency; the site's operator can see with conclave device probe what this device lacks"}

// deviceFix is what to do about a device that failed.
const deviceFix = "try again, or use another node; this one's readiness (GET /v1/ready) names the cause"

// deviceError is kms.Unavailable with what the device did not do.
func deviceError(err error, what string) error {
	return kms.Wrap(kms.Unavailable, err, "the device of this node did not "+what, deviceFix)
}

// unsupported reports whether a device says that it cannot do a thing at all.
func unsupported(err error) bool {
	var cannot interface{ Unsupported() bool }
	return errors.As(err, &cannot) && cannot.Unsupported()
}

// loadError is deviceError, but kms.ErrOpen for a blob that does not open.
func loadError(err error) error {
	var refused interface{ Invalid() bool }
	if errors.As(err, &refused) && refused.Invalid() {
		return kms.ErrOpen
	}
	return deviceError(err, "load the key")
}

// ecdhCurve is the curve of an ECDSA algorithm in the type that devices take.
func ecdhCurve(a kms.Algorithm) ecdh.Curve {
	if a == kms.ECDSAP384 {
		return ecdh.P384()
	}
	return ecdh.P256()
}

// loadBlob loads the key version behind a device blob.
func loadBlob(ctx context.Context, hw Hardware, b KeyBinding, blob []byte) (*Material, error) {
	if b.Purpose == kms.Sign {
		sign, unload, err := hw.LoadSigner(ctx, ecdhCurve(b.Algorithm), blob)
		if err != nil {
			return nil, loadError(err)
		}
		return inDevice(b, nil, sign, unload), nil
	}
	mac, unload, err := hw.LoadHMAC(ctx, blob)
	if err != nil {
		return nil, loadError(err)
	}
	return inDevice(b, mac, nil, unload), nil
}

// inDevice is the material that a device has loaded: one of mac and sign is nil.
func inDevice(b KeyBinding, mac, sign func(context.Context, []byte) ([]byte, error), unload func()) *Material {
	m := &Material{binding: b, protection: kms.Hardware, unload: unload, source: noHMAC{}}
	if mac != nil {
		m.source = deviceHMAC{mac}
	}
	if sign != nil {
		m.device = &deviceSigner{sign}
	}
	return m
}

// deviceHMAC is the source of a key version in a device.
type deviceHMAC struct {
	mac func(ctx context.Context, message []byte) ([]byte, error)
}

func (d deviceHMAC) HMAC(ctx context.Context, dst, input []byte) ([]byte, error) {
	sum, err := d.mac(ctx, input)
	if err != nil {
		return nil, deviceError(err, "compute an HMAC")
	}
	defer secret.Wipe(sum)
	if len(sum) != sha256.Size {
		return nil, kms.Errorf(kms.Unavailable, "the device of this node returned an HMAC-SHA-256 of %d bytes", len(sum))
	}
	return append(dst, sum...), nil
}

// noHMAC is the source of a sign key in a device: its purpose keeps it from being
// asked.
type noHMAC struct{}

func (noHMAC) HMAC(context.Context, []byte, []byte) ([]byte, error) {
	return nil, kms.Errorf(kms.Internal, "a sign key computes no HMAC")
}

// deviceSigner is a sign key in a device.
type deviceSigner struct {
	digest func(ctx context.Context, digest []byte) ([]byte, error)
}

// raw returns the signature of a message as r‖s.
func (d *deviceSigner) raw(ctx context.Context, a kms.Algorithm, message []byte) ([]byte, error) {
	sig, err := d.digest(ctx, digest(a, message))
	if err != nil {
		return nil, deviceError(err, "sign")
	}
	if len(sig) != 2*materialSize(a) {
		return nil, kms.Errorf(kms.Unavailable, "the device of this node returned a signature of %d bytes", len(sig))
	}
	return sig, nil
}

// sign returns the signature of a message in ASN.1 DER.
func (d *deviceSigner) sign(ctx context.Context, a kms.Algorithm, message []byte) ([]byte, error) {
	raw, err := d.raw(ctx, a, message)
	if err != nil {
		return nil, err
	}
	return derSignature(raw)
}

// derSignature turns r‖s into the form of RFC 3279, section 2.2.3.
func derSignature(raw []byte) ([]byte, error) {
	n := len(raw) / 2
	der, err := asn1.Marshal(struct{ R, S *big.Int }{new(big.Int).SetBytes(raw[:n]), new(big.Int).SetBytes(raw[n:])})
	if err != nil {
		return nil, kms.Wrap(kms.Internal, err, "the signature cannot be encoded", "")
	}
	return der, nil
}
