package pqc

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"
	"io"
	"math/big"
	"runtime"

	"github.com/cloudflare/circl/sign/mldsa/mldsa65"

	"github.com/conclave-kms/conclave/kms/secret"
)

// MaxContext is the longest signature context in bytes (FIPS 204, section 5.2).
const MaxContext = 255

// HybridSeedSize is the length in bytes of a hybrid signing key's seed: ML-DSA
// seed ‖ Ed25519 seed.
const HybridSeedSize = mldsa65.SeedSize + ed25519.SeedSize

var (
	// ErrSignature is the one error for a signature that does not verify,
	// whatever the reason.
	ErrSignature = errors.New("pqc: the signature does not verify")

	// ErrContext reports a context longer than MaxContext.
	ErrContext = errors.New("pqc: the signature context is longer than 255 bytes")
)

// Prefix and label of id-MLDSA65-Ed25519-SHA512 in
// draft-ietf-lamps-pq-composite-sigs (OID 1.3.6.1.5.5.7.6.48).
const (
	compositePrefix = "CompositeAlgorithmSignatures2025"
	compositeLabel  = "COMPSIG-MLDSA65-Ed25519-SHA512"
)

// HybridKey is a custodian's signing key: ML-DSA-65 and Ed25519, used only
// together. Sign is safe for concurrent use; Destroy is not.
type HybridKey struct {
	seed *secret.Bytes
	pq   *mldsa65.PrivateKey
	ed   ed25519.PrivateKey
	pub  []byte
}

// GenerateHybrid makes a new key from r, or from the system's generator when r
// is nil.
func GenerateHybrid(r io.Reader) (*HybridKey, error) {
	seed, err := randomSecret(r, HybridSeedSize)
	if err != nil {
		return nil, err
	}
	defer seed.Destroy()
	return NewHybridKey(seed)
}

// NewHybridKey expands a 64-byte seed (ML-DSA seed ‖ Ed25519 seed, the
// composite private key of the draft) and keeps a copy of it. Errors: ErrKey.
func NewHybridKey(seed *secret.Bytes) (*HybridKey, error) {
	if seed.Len() != HybridSeedSize {
		return nil, fmt.Errorf("%w: the seed of %v has %d bytes", ErrKey, MLDSA65Ed25519, HybridSeedSize)
	}
	keep, err := secret.Copy(seed.Reveal())
	runtime.KeepAlive(seed)
	if err != nil {
		return nil, err
	}
	pqPub, pq := mldsa65.NewKeyFromSeed((*[mldsa65.SeedSize]byte)(keep.Reveal()))
	ed := ed25519.NewKeyFromSeed(keep.Reveal()[mldsa65.SeedSize:])
	pub := append(pqPub.Bytes(), ed[ed25519.SeedSize:]...)
	return &HybridKey{seed: keep, pq: pq, ed: ed, pub: pub}, nil
}

// PublicKey returns a copy of the composite public key, 1984 bytes: ML-DSA-65
// public key ‖ Ed25519 public key.
func (k *HybridKey) PublicKey() []byte { return bytes.Clone(k.pub) }

// Destroy zeroises the seed and the Ed25519 key and makes the key unusable. The
// expanded ML-DSA key is left to the garbage collector. It may be called more
// than once.
func (k *HybridKey) Destroy() {
	k.seed.Destroy()
	secret.Wipe(k.ed)
	k.pq, k.ed = nil, nil
}

// Sign returns the composite signature of message under context (at most 255
// bytes), 3373 bytes: ML-DSA-65 signature (hedged) ‖ Ed25519 signature.
// Errors: ErrContext, ErrKey after Destroy.
func (k *HybridKey) Sign(message, context []byte) ([]byte, error) {
	if k.pq == nil {
		return nil, fmt.Errorf("%w: it was destroyed", ErrKey)
	}
	m, err := compositeMessage(message, context)
	if err != nil {
		return nil, err
	}
	sig := make([]byte, mldsa65.SignatureSize, mldsa65.SignatureSize+ed25519.SignatureSize)
	if err := mldsa65.SignTo(k.pq, m, []byte(compositeLabel), true, sig); err != nil {
		return nil, fmt.Errorf("pqc: sign with ML-DSA: %w", err)
	}
	return append(sig, ed25519.Sign(k.ed, m)...), nil
}

// compositeMessage is M' of the draft:
// prefix ‖ label ‖ len(context) (1 byte) ‖ context ‖ SHA-512(message).
func compositeMessage(message, context []byte) ([]byte, error) {
	if len(context) > MaxContext {
		return nil, ErrContext
	}
	digest := sha512.Sum512(message)
	m := make([]byte, 0, len(compositePrefix)+len(compositeLabel)+1+len(context)+len(digest))
	m = append(m, compositePrefix...)
	m = append(m, compositeLabel...)
	m = append(m, byte(len(context)))
	m = append(m, context...)
	return append(m, digest[:]...), nil
}

// VerifyHybrid checks a composite signature; both halves must verify. Errors:
// ErrPublicKey for a key of the wrong length, ErrContext, ErrSignature.
func VerifyHybrid(pub, message, context, sig []byte) error {
	if len(pub) != mldsa65.PublicKeySize+ed25519.PublicKeySize {
		return fmt.Errorf("%w: %v has %d bytes", ErrPublicKey, MLDSA65Ed25519, mldsa65.PublicKeySize+ed25519.PublicKeySize)
	}
	m, err := compositeMessage(message, context)
	if err != nil {
		return err
	}
	if len(sig) != mldsa65.SignatureSize+ed25519.SignatureSize {
		return ErrSignature
	}
	var pq mldsa65.PublicKey
	pq.Unpack((*[mldsa65.PublicKeySize]byte)(pub))
	pqOK := mldsa65.Verify(&pq, m, []byte(compositeLabel), sig[:mldsa65.SignatureSize])
	edOK := ed25519.Verify(pub[mldsa65.PublicKeySize:], m, sig[mldsa65.SignatureSize:])
	if !pqOK || !edOK {
		return ErrSignature
	}
	return nil
}

// ToBeSigned returns the bytes that the classical suites sign:
// len(context) (1 byte) ‖ context ‖ message. An Ed25519 signer signs these, an
// ECDSA signer their Digest. Errors: ErrContext.
func ToBeSigned(message, context []byte) ([]byte, error) {
	if len(context) > MaxContext {
		return nil, ErrContext
	}
	out := make([]byte, 0, 1+len(context)+len(message))
	out = append(out, byte(len(context)))
	out = append(out, context...)
	return append(out, message...), nil
}

// Digest returns what an ECDSA device signs: SHA-256 (P-256) or SHA-384 (P-384)
// of ToBeSigned. Errors: ErrSuite for a suite that does not sign a digest,
// ErrContext.
func Digest(suite SuiteID, message, context []byte) ([]byte, error) {
	tbs, err := ToBeSigned(message, context)
	if err != nil {
		return nil, err
	}
	switch suite {
	case ECDSAP256SHA256:
		d := sha256.Sum256(tbs)
		return d[:], nil
	case ECDSAP384SHA384:
		d := sha512.Sum384(tbs)
		return d[:], nil
	}
	return nil, fmt.Errorf("%w: %v does not sign a digest", ErrSuite, suite)
}

// Verify checks the signature of message under context (at most 255 bytes) for
// any signature suite.
//
//   - ECDSA: pub is a SEC1 uncompressed point, sig is r‖s, each as long as the
//     curve's order, over Digest. Both (r, s) and (r, -s) verify: a signature is
//     no unique name of what it signs.
//   - Ed25519: 32 and 64 bytes, over ToBeSigned.
//   - MLDSA65Ed25519: as VerifyHybrid.
//
// Errors: ErrSuite, ErrPublicKey, ErrContext, ErrSignature.
func Verify(suite SuiteID, pub, message, context, sig []byte) error {
	s, err := lookupKind(suite, Signature)
	if err != nil {
		return err
	}
	if len(pub) != s.PublicKeySize {
		return fmt.Errorf("%w: %v has %d bytes, not %d", ErrPublicKey, suite, s.PublicKeySize, len(pub))
	}
	if len(sig) != s.SignatureSize {
		return ErrSignature
	}
	switch suite {
	case MLDSA65Ed25519:
		return VerifyHybrid(pub, message, context, sig)
	case Ed25519:
		tbs, err := ToBeSigned(message, context)
		if err != nil {
			return err
		}
		return verifyEd25519(pub, tbs, sig)
	case ECDSAP256SHA256, ECDSAP384SHA384:
		digest, err := Digest(suite, message, context)
		if err != nil {
			return err
		}
		return verifyECDSA(suite, pub, digest, sig)
	}
	return fmt.Errorf("%w: %v", ErrSuite, suite)
}

// verifyEd25519 expects the lengths of pub and sig to have been checked.
func verifyEd25519(pub, message, sig []byte) error {
	if !ed25519.Verify(pub, message, sig) {
		return ErrSignature
	}
	return nil
}

// verifyECDSA expects the lengths of pub and sig to have been checked.
func verifyECDSA(suite SuiteID, pub, digest, sig []byte) error {
	curve := elliptic.P256()
	if suite == ECDSAP384SHA384 {
		curve = elliptic.P384()
	}
	key, err := ecdsa.ParseUncompressedPublicKey(curve, pub)
	if err != nil {
		return fmt.Errorf("%w: not a point on %s", ErrPublicKey, curve.Params().Name)
	}
	n := len(sig) / 2
	r, s := new(big.Int).SetBytes(sig[:n]), new(big.Int).SetBytes(sig[n:])
	if !ecdsa.Verify(key, digest, r, s) {
		return ErrSignature
	}
	return nil
}
