package fakedevice

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"sync/atomic"

	kwp "github.com/tink-crypto/tink-go/v2/kwp/subtle"
)

// The operations of imported keys, as the faults see them. A load is also made
// when a closure finds its key gone, see LoseKeys.
const (
	OpLoad       = "load"
	OpHMAC       = "hmac"
	OpLoadedSign = "loaded sign"
)

// Sizes and numbers of package hsm's key blobs, written down again: the fake
// checks that format, it does not share its code.
const (
	importVersion = 1
	kdfNull       = 1
	kdfSHA256     = 2
	maxMessage    = 64 << 10
)

// UseSHA256KDF makes ImportKey ask for CKD_SHA256_KDF, which SoftHSM has not.
func (d *Device) UseSHA256KDF() { d.sha256KDF.Store(true) }

// LoseKeys makes all loaded keys go from the device, as a lost session does: the
// closures load theirs again when they are used next.
func (d *Device) LoseKeys() { d.lost.Add(1) }

// ImportKey says how others wrap a key for this device: as for package hsm.
func (d *Device) ImportKey() (kind string, public []byte) {
	k := byte(kdfNull)
	if d.sha256KDF.Load() {
		k = kdfSHA256
	}
	return "pkcs11-ecdh-kwp", append([]byte{importVersion, k}, d.AgreementKey().Bytes()...)
}

// loadedKey is what a closure holds.
type loadedKey struct {
	d        *Device
	material []byte
	seen     atomic.Uint64 // d.lost at the load
	unloaded atomic.Bool
}

var errBlob = fmt.Errorf("%w: the key blob does not open", ErrInvalid)

// open opens a blob of package hsm's WrapHMAC or WrapSigner.
func (d *Device) open(blob []byte, kind byte) ([]byte, error) {
	point := len(d.AgreementKey().Bytes())
	if len(blob) < 4 || blob[0] != importVersion || blob[1] != kind || len(blob) < 4+int(blob[3])+point {
		return nil, errBlob
	}
	at := 4 + int(blob[3])
	if blob[2] == kdfNull && blob[3] != 0 || blob[3] > 64 {
		return nil, errBlob
	}
	peer, err := d.keys.agreement.Curve().NewPublicKey(blob[at : at+point])
	if err != nil {
		return nil, errBlob
	}
	z, err := d.keys.agreement.ECDH(peer)
	if err != nil {
		return nil, errBlob
	}
	var kek []byte
	switch blob[2] {
	case kdfNull:
		kek = z[len(z)-32:]
	case kdfSHA256:
		h := sha256.Sum256(bytes.Join([][]byte{z, {0, 0, 0, 1}, []byte("conclave device import\x00"), blob[:at]}, nil))
		kek = h[:]
	default:
		return nil, errBlob
	}
	box, err := kwp.NewKWP(kek)
	if err != nil {
		return nil, err
	}
	plain, err := box.Unwrap(blob[at+point:])
	if err != nil {
		return nil, errBlob
	}
	return plain, nil
}

// load opens the blob, be it at first or after LoseKeys.
func (d *Device) load(ctx context.Context, blob []byte, kind byte, check func([]byte) error) (*loadedKey, error) {
	blob = bytes.Clone(blob)
	if err := d.begin(ctx, OpLoad); err != nil {
		return nil, err
	}
	material, err := d.open(blob, kind)
	if err == nil {
		err = check(material)
	}
	if err != nil {
		return nil, err
	}
	k := &loadedKey{d: d, material: material}
	k.seen.Store(d.lost.Load())
	return k, nil
}

// use admits one use of a loaded key.
func (k *loadedKey) use(ctx context.Context, op string) error {
	if k.unloaded.Load() {
		return fmt.Errorf("%w: the key was unloaded", ErrInvalid)
	}
	if now := k.d.lost.Load(); now != k.seen.Load() {
		if err := k.d.begin(ctx, OpLoad); err != nil {
			return err
		}
		k.seen.Store(now)
	}
	return k.d.begin(ctx, op)
}

// LoadHMAC is that of package hsm.
func (d *Device) LoadHMAC(ctx context.Context, blob []byte) (mac func(ctx context.Context, message []byte) ([]byte, error), unload func(), err error) {
	k, err := d.load(ctx, blob, 1, func(m []byte) error {
		if len(m) != 32 {
			return errBlob
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	mac = func(ctx context.Context, message []byte) ([]byte, error) {
		if len(message) > maxMessage {
			return nil, fmt.Errorf("%w: the message has %d bytes", ErrInvalid, len(message))
		}
		if err := k.use(ctx, OpHMAC); err != nil {
			return nil, err
		}
		h := hmac.New(sha256.New, k.material)
		_, _ = h.Write(message)
		return d.end(OpHMAC, h.Sum(nil)), nil
	}
	return mac, func() { k.unloaded.Store(true) }, nil
}

// LoadSigner is that of package hsm.
func (d *Device) LoadSigner(ctx context.Context, c ecdh.Curve, blob []byte) (sign func(ctx context.Context, digest []byte) ([]byte, error), unload func(), err error) {
	kind, n, ec, err := signerKind(c)
	if err != nil {
		return nil, nil, err
	}
	if len(blob) > 1 && (blob[1] == kind+2 || blob[1] == 6 && kind == 2) {
		kind = blob[1] // as a token wrote it
	}
	var key *ecdsa.PrivateKey
	k, err := d.load(ctx, blob, kind, func(m []byte) error {
		if kind == 6 { // zeros after it
			if len(m) != 72 || !bytes.Equal(m[67:], make([]byte, 5)) {
				return errBlob
			}
			m = m[:67]
		}
		parsed, err := x509.ParsePKCS8PrivateKey(m)
		if err != nil {
			return errBlob
		}
		var ok bool
		if key, ok = parsed.(*ecdsa.PrivateKey); !ok || key.Curve != ec {
			return errBlob
		}
		return nil
	})
	if err != nil {
		return nil, nil, err
	}
	sign = func(ctx context.Context, digest []byte) ([]byte, error) {
		if len(digest) != n {
			return nil, fmt.Errorf("%w: the digest has %d bytes instead of %d", ErrInvalid, len(digest), n)
		}
		if err := k.use(ctx, OpLoadedSign); err != nil {
			return nil, err
		}
		r, s, err := ecdsa.Sign(rand.Reader, key, digest)
		if err != nil {
			return nil, err
		}
		sig := make([]byte, 2*n)
		r.FillBytes(sig[:n])
		s.FillBytes(sig[n:])
		return d.end(OpLoadedSign, sig), nil
	}
	return sign, func() { k.unloaded.Store(true) }, nil
}

// signerKind returns the number of a curve's private keys in a blob, without the
// public key, and the length of a coordinate.
func signerKind(c ecdh.Curve) (kind byte, size int, ec elliptic.Curve, err error) {
	switch c {
	case ecdh.P256():
		return 2, 32, elliptic.P256(), nil
	case ecdh.P384():
		return 3, 48, elliptic.P384(), nil
	}
	return 0, 0, nil, fmt.Errorf("%w: curve is neither P-256 nor P-384", ErrInvalid)
}
