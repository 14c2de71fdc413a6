package pqc

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/fips140"
	"crypto/hpke"
	"crypto/mlkem"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime"

	"github.com/cloudflare/circl/kem"
	"github.com/cloudflare/circl/kem/mlkem/mlkem1024"
	"github.com/cloudflare/circl/kem/mlkem/mlkem768"

	"github.com/conclave-kms/conclave/kms/secret"
)

// KeyExchanger is the classical half of a recipient key. A device satisfies it
// without ever showing its private key.
type KeyExchanger = ecdh.KeyExchanger

// MLKEMSeedSize is the length in bytes of an ML-KEM seed d‖z (FIPS 203,
// section 7.1), the same for both parameter sets.
const MLKEMSeedSize = 64

var (
	// ErrOpen is the one error for everything that is wrong with a sealed
	// message: another suite, length, key, info, AAD, or tampering anywhere.
	ErrOpen = errors.New("pqc: cannot open the sealed message")

	// ErrDevice reports that the classical half failed to do its work, so
	// nothing is known of the sealed message. The KeyExchanger's own error is
	// wrapped beside it.
	ErrDevice = errors.New("pqc: the key exchange of the device failed")

	// ErrPublicKey reports a public key of the wrong length or not valid for
	// its suite.
	ErrPublicKey = errors.New("pqc: invalid public key")

	// ErrKey reports a private key or seed that does not fit its suite.
	ErrKey = errors.New("pqc: invalid private key")
)

// kemSuite is what the code needs to know of a KEM suite beyond the table.
type kemSuite struct {
	Suite
	hpke     hpke.KEM
	kdf      hpke.KDF
	curve    ecdh.Curve
	zSize    int // shared secret of the classical half
	seedSize int // private scalar of the classical half
	pqCt     int // ML-KEM ciphertext
	pq       kem.Scheme
	parseEK  func([]byte) (crypto.Encapsulator, error)
}

func lookupKEM(id SuiteID) (*kemSuite, error) {
	s, err := lookupKind(id, KEM)
	if err != nil {
		return nil, err
	}
	k := &kemSuite{Suite: s, kdf: hpke.HKDFSHA256(), pq: mlkem768.Scheme(), pqCt: mlkem.CiphertextSize768, zSize: 32, seedSize: 32, parseEK: parseEK768}
	switch id {
	case MLKEM768P256:
		k.hpke, k.curve = hpke.MLKEM768P256(), ecdh.P256()
	case XWing:
		k.hpke, k.curve = hpke.MLKEM768X25519(), ecdh.X25519()
	case MLKEM1024P384:
		k.hpke, k.curve, k.zSize, k.seedSize = hpke.MLKEM1024P384(), ecdh.P384(), 48, 48
		k.kdf, k.pq, k.pqCt, k.parseEK = hpke.HKDFSHA384(), mlkem1024.Scheme(), mlkem.CiphertextSize1024, parseEK1024
	default:
		return nil, fmt.Errorf("%w: %v", ErrSuite, id)
	}
	return k, nil
}

func parseEK768(b []byte) (crypto.Encapsulator, error)  { return mlkem.NewEncapsulationKey768(b) }
func parseEK1024(b []byte) (crypto.Encapsulator, error) { return mlkem.NewEncapsulationKey1024(b) }

// decapsulator is circl's ML-KEM behind crypto.Decapsulator.
type decapsulator struct {
	scheme kem.Scheme
	dk     kem.PrivateKey
	ek     crypto.Encapsulator // the standard library's type, as crypto/hpke demands
}

func newDecapsulator(s *kemSuite, seed []byte) (*decapsulator, error) {
	if len(seed) != MLKEMSeedSize || s.pq.SeedSize() != MLKEMSeedSize {
		return nil, fmt.Errorf("%w: an ML-KEM seed has %d bytes", ErrKey, MLKEMSeedSize)
	}
	ek, dk := s.pq.DeriveKeyPair(seed)
	packed, err := ek.MarshalBinary()
	if err != nil {
		return nil, fmt.Errorf("%w: pack encapsulation key: %v", ErrKey, err)
	}
	std, err := s.parseEK(packed)
	if err != nil {
		return nil, fmt.Errorf("%w: encapsulation key: %v", ErrKey, err)
	}
	return &decapsulator{scheme: s.pq, dk: dk, ek: std}, nil
}

// Encapsulator implements crypto.Decapsulator.
func (d *decapsulator) Encapsulator() crypto.Encapsulator { return d.ek }

// Decapsulate implements crypto.Decapsulator. A ciphertext of the right length
// never fails: a forged one gives a secret unrelated to the sender's (FIPS 203,
// implicit rejection).
func (d *decapsulator) Decapsulate(ct []byte) ([]byte, error) {
	if len(ct) != d.scheme.CiphertextSize() {
		return nil, ErrOpen
	}
	return d.scheme.Decapsulate(d.dk, ct)
}

// GenerateSeed reads a new 64-byte ML-KEM seed d‖z from r, or from the system's
// generator when r is nil. The caller destroys it.
func GenerateSeed(r io.Reader) (*secret.Bytes, error) { return randomSecret(r, MLKEMSeedSize) }

func randomSecret(r io.Reader, n int) (*secret.Bytes, error) {
	if r == nil {
		r = rand.Reader
	}
	s, err := secret.New(n)
	if err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(r, s.Reveal()); err != nil {
		s.Destroy()
		return nil, fmt.Errorf("pqc: read randomness: %w", err)
	}
	return s, nil
}

// PrivateKey opens what was sealed to it. It is immutable and safe for
// concurrent use if its KeyExchanger is.
type PrivateKey struct {
	suite *kemSuite
	pq    *decapsulator
	t     KeyExchanger
	pub   *PublicKey
}

// NewPrivateKey joins the ML-KEM key expanded from seed (64 bytes d‖z, which
// the caller keeps and destroys) with the classical half t, whose curve must be
// that of the suite. The expanded ML-KEM key lives in ordinary memory.
// Errors: ErrSuite, ErrKey.
func NewPrivateKey(suite SuiteID, seed *secret.Bytes, t KeyExchanger) (*PrivateKey, error) {
	s, err := lookupKEM(suite)
	if err != nil {
		return nil, err
	}
	if t == nil || t.Curve() != s.curve {
		return nil, fmt.Errorf("%w: the classical half of %v must be on %v", ErrKey, suite, s.curve)
	}
	tPub := t.PublicKey()
	if tPub == nil || tPub.Curve() != s.curve {
		return nil, fmt.Errorf("%w: the classical half of %v has no public key on %v", ErrKey, suite, s.curve)
	}
	pq, err := newDecapsulator(s, seed.Reveal())
	runtime.KeepAlive(seed)
	if err != nil {
		return nil, err
	}
	hp, err := hpke.NewHybridPublicKey(pq.ek, tPub)
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrKey, err)
	}
	return &PrivateKey{suite: s, pq: pq, t: t, pub: newPublicKey(s, hp, tPub)}, nil
}

// WithExchanger returns the same key with another handle t to the same
// classical half, for example one that carries the context of a call. It shares
// the expanded ML-KEM key. If t holds a different key, Open fails with
// ErrDevice.
func (k *PrivateKey) WithExchanger(t KeyExchanger) *PrivateKey {
	c := *k
	c.t = t
	return &c
}

// PublicKey returns the public half.
func (k *PrivateKey) PublicKey() *PublicKey { return k.pub }

// Suite returns the key's suite.
func (k *PrivateKey) Suite() SuiteID { return k.suite.ID }

// Open opens the output of Seal under the same info and aad. It returns ErrOpen
// for whatever is wrong with the message, and ErrDevice with the
// KeyExchanger's error when the classical half did not answer. The plaintext is
// the caller's to wipe.
func (k *PrivateKey) Open(info, aad, sealed []byte) ([]byte, error) {
	s := k.suite
	if len(sealed) < s.Overhead || SuiteID(binary.BigEndian.Uint16(sealed)) != s.ID {
		return nil, ErrOpen
	}
	enc, ct := sealed[2:2+s.EncSize], sealed[2+s.EncSize:]
	// The device is asked only about points that are valid, so that its errors
	// are about itself and not about the message.
	if !validPoint(s.curve, enc[s.pqCt:]) {
		return nil, ErrOpen
	}
	x := &exchange{t: k.t, pub: k.pub.t, size: s.zSize}
	priv, err := hpke.NewHybridPrivateKey(k.pq, x)
	if err != nil {
		return nil, ErrOpen
	}
	r, err := hpke.NewRecipient(enc, priv, s.kdf, hpke.AES256GCM(), info)
	if x.err != nil {
		return nil, x.err
	}
	if err != nil {
		return nil, ErrOpen
	}
	plaintext, err := r.Open(aad, ct)
	if err != nil {
		return nil, ErrOpen
	}
	return plaintext, nil
}

// probe is a fixed scalar whose only use is to find points of low order on
// Curve25519: every scalar sends them to zero.
var probe = bytes.Repeat([]byte{0x42}, 32)

// validPoint tells whether point is a public key on curve, and for X25519
// whether a key exchange with it gives anything but zero.
func validPoint(curve ecdh.Curve, point []byte) (ok bool) {
	fips140.WithoutEnforcement(func() { // the approved half of the hybrid is ML-KEM
		pub, err := curve.NewPublicKey(point)
		if err != nil {
			return
		}
		if curve == ecdh.X25519() {
			key, err := curve.NewPrivateKey(probe)
			if err != nil {
				return
			}
			if _, err := key.ECDH(pub); err != nil {
				return
			}
		}
		ok = true
	})
	return ok
}

// exchange is one use of the classical half. It keeps the device's error apart
// from all others and does not ask the device for its public key again.
type exchange struct {
	t    KeyExchanger
	pub  *ecdh.PublicKey
	size int
	err  error
}

// Curve implements ecdh.KeyExchanger.
func (x *exchange) Curve() ecdh.Curve { return x.pub.Curve() }

// PublicKey implements ecdh.KeyExchanger.
func (x *exchange) PublicKey() *ecdh.PublicKey { return x.pub }

// ECDH implements ecdh.KeyExchanger.
func (x *exchange) ECDH(peer *ecdh.PublicKey) ([]byte, error) {
	z, err := x.ask(peer)
	x.err = err
	return z, err
}

func (x *exchange) ask(peer *ecdh.PublicKey) ([]byte, error) {
	if x.t == nil {
		return nil, fmt.Errorf("%w: no key exchanger", ErrDevice)
	}
	if p := x.t.PublicKey(); p == nil || !p.Equal(x.pub) {
		return nil, fmt.Errorf("%w: it holds another key", ErrDevice)
	}
	z, err := x.t.ECDH(peer)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDevice, err)
	}
	if len(z) != x.size {
		return nil, fmt.Errorf("%w: its shared secret has %d bytes, not %d", ErrDevice, len(z), x.size)
	}
	return z, nil
}

// PublicKey seals to the holder of a PrivateKey. It is immutable and safe for
// concurrent use.
type PublicKey struct {
	suite *kemSuite
	key   hpke.PublicKey
	t     *ecdh.PublicKey
	b     []byte
}

func newPublicKey(s *kemSuite, key hpke.PublicKey, t *ecdh.PublicKey) *PublicKey {
	return &PublicKey{suite: s, key: key, t: t, b: key.Bytes()}
}

// ParsePublicKey decodes an ML-KEM encapsulation key followed by the classical
// public key (SEC1 uncompressed point, or 32 bytes for X25519), as
// draft-ietf-hpke-pq serialises it. Errors: ErrSuite, ErrPublicKey.
func ParsePublicKey(suite SuiteID, b []byte) (*PublicKey, error) {
	s, err := lookupKEM(suite)
	if err != nil {
		return nil, err
	}
	if len(b) != s.PublicKeySize {
		return nil, fmt.Errorf("%w: %v has %d bytes, not %d", ErrPublicKey, suite, s.PublicKeySize, len(b))
	}
	point := b[len(b)-(s.EncSize-s.pqCt):]
	if !validPoint(s.curve, point) {
		return nil, fmt.Errorf("%w: its classical half is not a point on %v", ErrPublicKey, s.curve)
	}
	key, err := s.hpke.NewPublicKey(bytes.Clone(b))
	if err != nil {
		return nil, fmt.Errorf("%w: %v", ErrPublicKey, err)
	}
	return newPublicKey(s, key, nil), nil
}

// Bytes returns a copy of the key in the form that ParsePublicKey reads.
func (p *PublicKey) Bytes() []byte { return bytes.Clone(p.b) }

// Suite returns the key's suite.
func (p *PublicKey) Suite() SuiteID { return p.suite.ID }

// Equal tells whether two public keys are the same key of the same suite.
func (p *PublicKey) Equal(o *PublicKey) bool {
	return p != nil && o != nil && p.suite.ID == o.suite.ID && bytes.Equal(p.b, o.b)
}

// Seal encrypts plaintext to the key with HPKE in base mode (RFC 9180, section
// 6.1), binding info and aad. The result is suite id (2 bytes, big endian) ‖
// encapsulated key ‖ ciphertext and tag.
func (p *PublicKey) Seal(info, aad, plaintext []byte) ([]byte, error) {
	enc, sender, err := hpke.NewSender(p.key, p.suite.kdf, hpke.AES256GCM(), info)
	if err != nil {
		return nil, fmt.Errorf("pqc: encapsulate: %w", err)
	}
	ct, err := sender.Seal(aad, plaintext)
	if err != nil {
		return nil, fmt.Errorf("pqc: seal: %w", err)
	}
	out := make([]byte, 0, 2+len(enc)+len(ct))
	out = binary.BigEndian.AppendUint16(out, uint16(p.suite.ID))
	out = append(out, enc...)
	return append(out, ct...), nil
}
