package hsm

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"errors"
	"fmt"

	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/miekg/pkcs11"
)

// Sizes of wrapping.
const (
	MaxWrap = 96       // bytes of key that Wrap takes
	MaxAAD  = 64 << 10 // bytes of AAD that Wrap and Unwrap take

	blobVersion = 1
	ivSize      = 12
	tagSize     = 16
	overhead    = 1 + ivSize + tagSize
)

// ECDH returns the raw shared secret Z of the agreement key and peer: the
// x-coordinate, 48 bytes on P-384 and 32 on P-256 (SP 800-56A section 5.7.1.2).
// The caller wipes it. Errors: ErrInvalid for a peer on another curve,
// ErrUnavailable.
func (d *Device) ECDH(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error) {
	if peer == nil || peer.Curve() != d.set.curve.ecdh {
		return nil, invalidf("ECDH: the peer's key is not on %s", d.set.curve.name)
	}
	point := peer.Bytes()
	return call(ctx, d, callOptions{op: "ecdh"}, func(s *session) ([]byte, error) {
		return s.ecdh(s.keys.agreement, point)
	})
}

func (s *session) ecdh(key pkcs11.ObjectHandle, point []byte) ([]byte, error) {
	h, err := s.derive(key, point)
	if err != nil {
		return nil, err
	}
	z, err := s.attribute(h, pkcs11.CKA_VALUE)
	if e := s.p11.DestroyObject(s.h, h); e != nil && err == nil {
		err = fmt.Errorf("C_DestroyObject: %w", e)
	}
	if err == nil && len(z) != s.curve.size {
		err = unavailablef("ECDH: the token returned %d bytes instead of %d", len(z), s.curve.size)
	}
	if err != nil {
		secret.Wipe(z)
		return nil, err
	}
	return z, nil
}

// derive makes the raw shared secret as a readable session object.
func (s *session) derive(key pkcs11.ObjectHandle, point []byte) (pkcs11.ObjectHandle, error) {
	h, err := s.p11.DeriveKey(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDH1_DERIVE,
		pkcs11.NewECDH1DeriveParams(pkcs11.CKD_NULL, nil, point))}, key, []*pkcs11.Attribute{
		pkcs11.NewAttribute(pkcs11.CKA_CLASS, pkcs11.CKO_SECRET_KEY),
		pkcs11.NewAttribute(pkcs11.CKA_KEY_TYPE, pkcs11.CKK_GENERIC_SECRET),
		pkcs11.NewAttribute(pkcs11.CKA_VALUE_LEN, s.curve.size),
		pkcs11.NewAttribute(pkcs11.CKA_TOKEN, false),
		pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, true),
		pkcs11.NewAttribute(pkcs11.CKA_SENSITIVE, false),
		pkcs11.NewAttribute(pkcs11.CKA_EXTRACTABLE, true),
	})
	if err != nil {
		return 0, fmt.Errorf("C_DeriveKey: %w", err)
	}
	return h, nil
}

// Sign returns the ECDSA signature of a digest under the signing key as r‖s,
// each of the curve's coordinate length. The digest is SHA-384 (48 bytes) on P-384 and
// SHA-256 (32 bytes) on P-256; other lengths are ErrInvalid.
func (d *Device) Sign(ctx context.Context, digest []byte) ([]byte, error) {
	if len(digest) != d.set.curve.digest {
		return nil, invalidf("Sign: the digest has %d bytes, %s takes %d", len(digest), d.set.curve.name, d.set.curve.digest)
	}
	digest = bytes.Clone(digest)
	return call(ctx, d, callOptions{op: "sign"}, func(s *session) ([]byte, error) {
		return s.sign(s.keys.signing, digest)
	})
}

func (s *session) sign(key pkcs11.ObjectHandle, digest []byte) ([]byte, error) {
	return s.signOn(s.curve, key, digest)
}

func (s *session) signOn(crv curve, key pkcs11.ObjectHandle, digest []byte) ([]byte, error) {
	if err := s.p11.SignInit(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_ECDSA, nil)}, key); err != nil {
		return nil, fmt.Errorf("C_SignInit: %w", err)
	}
	sig, err := s.p11.Sign(s.h, digest)
	if err != nil {
		return nil, fmt.Errorf("C_Sign: %w", err)
	}
	if len(sig) != 2*crv.size {
		return nil, unavailablef("Sign: the token returned %d bytes instead of %d", len(sig), 2*crv.size)
	}
	return sig, nil
}

// Wrap returns key, 1 to MaxWrap bytes, encrypted under the wrapping key with
// AES-256-GCM (SP 800-38D) and bound to aad: version byte 1 ‖ 12-byte IV ‖
// ciphertext ‖ 16-byte tag. The IV is random. key stays as it is.
func (d *Device) Wrap(ctx context.Context, aad, key []byte) ([]byte, error) {
	if len(key) == 0 || len(key) > MaxWrap {
		return nil, invalidf("Wrap: the key has %d bytes, 1 to %d are possible", len(key), MaxWrap)
	}
	if len(aad) > MaxAAD {
		return nil, invalidf("Wrap: the AAD has more than %d bytes", MaxAAD)
	}
	held, err := secret.Copy(key) // the worker may outlive this call
	if err != nil {
		return nil, unavailablef("%v", err)
	}
	bound := boundAAD(aad)
	return call(ctx, d, callOptions{op: "wrap", release: held.Destroy}, func(s *session) ([]byte, error) {
		blob, err := s.seal(bound, held.Reveal())
		if err != nil {
			return nil, err
		}
		return blob.bytes(), nil
	})
}

// boundAAD is what GCM authenticates: the version byte and the caller's AAD.
func boundAAD(aad []byte) []byte {
	return append([]byte{blobVersion}, aad...)
}

func (s *session) seal(bound, plain []byte) (sealed, error) {
	iv := make([]byte, ivSize)
	if _, err := rand.Read(iv); err != nil {
		return sealed{}, err
	}
	p := pkcs11.NewGCMParams(iv, bound, 8*tagSize)
	defer p.Free()
	if err := s.p11.EncryptInit(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, p)}, s.keys.wrapping); err != nil {
		return sealed{}, fmt.Errorf("C_EncryptInit: %w", err)
	}
	ct, err := s.p11.Encrypt(s.h, plain)
	if err != nil {
		return sealed{}, fmt.Errorf("C_Encrypt: %w", err)
	}
	if len(ct) != len(plain)+tagSize {
		return sealed{}, unavailablef("Wrap: the token returned %d bytes instead of %d", len(ct), len(plain)+tagSize)
	}
	// Some tokens put an IV of their own in the place of ours.
	if iv = p.IV(); len(iv) != ivSize {
		return sealed{}, unavailablef("Wrap: the token changed the length of the IV")
	}
	return sealed{iv, ct}, nil
}

// Unwrap opens what Wrap returned, with the same aad. Every blob that does not
// open is ErrInvalid: too short, too long, of another version, altered, or
// wrapped by another key or with another aad.
func (d *Device) Unwrap(ctx context.Context, aad, wrapped []byte) (*secret.Bytes, error) {
	blob, err := parseBlob(wrapped)
	if err != nil {
		return nil, err
	}
	if len(aad) > MaxAAD {
		return nil, invalidf("Unwrap: the AAD has more than %d bytes", MaxAAD)
	}
	bound := boundAAD(aad)
	return call(ctx, d, callOptions{op: "unwrap"}, func(s *session) (*secret.Bytes, error) {
		plain, err := s.open(bound, blob)
		if err != nil {
			return nil, d.openError(err)
		}
		return secret.Move(plain)
	})
}

// sealed is a wrapped blob in its parts.
type sealed struct {
	iv, box []byte // box is the ciphertext and the tag
}

// parseBlob cuts a wrapped blob into copies of its parts.
func parseBlob(b []byte) (sealed, error) {
	if len(b) <= overhead || len(b) > overhead+MaxWrap || b[0] != blobVersion {
		return sealed{}, errBlob
	}
	b = bytes.Clone(b)
	return sealed{b[1 : 1+ivSize], b[1+ivSize:]}, nil
}

func (s sealed) bytes() []byte {
	return append(append([]byte{blobVersion}, s.iv...), s.box...)
}

var errBlob = invalidf("Unwrap: the blob does not open: it was altered, or wrapped by another key or with other AAD")

// errDecrypt marks a failure of C_Decrypt, in contrast to one of its Init.
var errDecrypt = errors.New("C_Decrypt")

func (s *session) open(bound []byte, blob sealed) ([]byte, error) {
	p := pkcs11.NewGCMParams(blob.iv, bound, 8*tagSize)
	defer p.Free()
	if err := s.p11.DecryptInit(s.h, []*pkcs11.Mechanism{pkcs11.NewMechanism(pkcs11.CKM_AES_GCM, p)}, s.keys.wrapping); err != nil {
		return nil, fmt.Errorf("C_DecryptInit: %w", err)
	}
	plain, err := s.p11.Decrypt(s.h, blob.box)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errDecrypt, err)
	}
	if len(plain) != len(blob.box)-tagSize {
		secret.Wipe(plain)
		return nil, unavailablef("Unwrap: the token returned a wrong length")
	}
	return plain, nil
}

// openError tells a blob that does not open from a device that fails. Tokens
// differ in what they return for a wrong tag; SoftHSM returns
// CKR_GENERAL_ERROR, which it also does when its storage has gone. So the key
// has to prove on another session that it still works: if it does, the blob is
// at fault.
func (d *Device) openError(err error) error {
	if !errors.Is(err, errDecrypt) {
		return err
	}
	if isRV(err, pkcs11.CKR_ENCRYPTED_DATA_INVALID, pkcs11.CKR_ENCRYPTED_DATA_LEN_RANGE, ckrAEADDecryptFailed) {
		return errBlob
	}
	if isLost(err) || isRV(err, pkcs11.CKR_HOST_MEMORY, pkcs11.CKR_DEVICE_MEMORY) {
		return err
	}
	s, e := d.openSession(false, true)
	if e == nil {
		e = s.keyWorks()
		s.close()
	}
	if e != nil {
		return errors.Join(errLost, err)
	}
	return errBlob
}

// ckrAEADDecryptFailed is CKR_AEAD_DECRYPT_FAILED of PKCS#11 3.0.
const ckrAEADDecryptFailed = 0x35

// keyWorks encrypts and decrypts a block under the wrapping key.
func (s *session) keyWorks() error {
	probe := make([]byte, 16)
	bound := boundAAD([]byte("probe"))
	blob, err := s.seal(bound, probe)
	if err != nil {
		return err
	}
	got, err := s.open(bound, blob)
	if err != nil {
		return err
	}
	if !bytes.Equal(got, probe) {
		return unavailablef("the wrapping key does not decrypt what it encrypted")
	}
	return nil
}

const randomChunk = 4096

// Random fills b from the token's random number generator.
func (d *Device) Random(ctx context.Context, b []byte) error {
	if len(b) == 0 {
		return d.usable(ctx)
	}
	n := len(b)
	got, err := call(ctx, d, callOptions{op: "random"}, func(s *session) ([]byte, error) {
		return s.random(n)
	})
	if err != nil {
		return err
	}
	copy(b, got)
	secret.Wipe(got)
	return nil
}

func (d *Device) usable(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return contextError("random", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return unavailablef("random: the device is closed")
	}
	return nil
}

func (s *session) random(n int) ([]byte, error) {
	out := make([]byte, 0, n)
	for len(out) < n {
		part, err := s.p11.GenerateRandom(s.h, min(randomChunk, n-len(out)))
		if err != nil {
			secret.Wipe(out)
			return nil, fmt.Errorf("C_GenerateRandom: %w", err)
		}
		out = append(out, part...)
		secret.Wipe(part)
	}
	return out, nil
}
