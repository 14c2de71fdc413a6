package pqc

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"runtime"

	"github.com/cloudflare/circl/sign/mldsa/mldsa44"

	"github.com/conclave-kms/conclave/kms/secret"
)

// Sizes of ML-DSA-44 in bytes (FIPS 204, table 2; the seed is ξ of algorithm 1).
const (
	MLDSA44SeedSize      = mldsa44.SeedSize
	MLDSA44PublicKeySize = mldsa44.PublicKeySize
	MLDSA44SignatureSize = mldsa44.SignatureSize
)

// MLDSA44Key is a key for cosignatures: pure ML-DSA-44 (FIPS 204), which is what
// C2SP's transparency log cosignatures have. Sign is safe for concurrent use;
// Destroy is not.
type MLDSA44Key struct {
	key *mldsa44.PrivateKey
	pub []byte
}

// GenerateMLDSA44Seed draws the 32-byte seed of a key from r, or from the system's
// generator when r is nil.
func GenerateMLDSA44Seed(r io.Reader) (*secret.Bytes, error) {
	return randomSecret(r, MLDSA44SeedSize)
}

// NewMLDSA44Key expands a 32-byte seed, which it does not keep. Errors: ErrKey.
func NewMLDSA44Key(seed *secret.Bytes) (*MLDSA44Key, error) {
	if seed.Len() != MLDSA44SeedSize {
		return nil, fmt.Errorf("%w: the seed of %v has %d bytes", ErrKey, MLDSA44, MLDSA44SeedSize)
	}
	pub, key := mldsa44.NewKeyFromSeed((*[MLDSA44SeedSize]byte)(seed.Reveal()))
	runtime.KeepAlive(seed)
	return &MLDSA44Key{key: key, pub: pub.Bytes()}, nil
}

// PublicKey returns a copy of the encoded public key, 1312 bytes.
func (k *MLDSA44Key) PublicKey() []byte { return bytes.Clone(k.pub) }

// Destroy makes the key unusable. The expanded key is left to the garbage
// collector. It may be called more than once.
func (k *MLDSA44Key) Destroy() { k.key = nil }

// Sign returns the signature of message under context (at most 255 bytes), hedged,
// 2420 bytes (FIPS 204, algorithm 2). Errors: ErrContext, ErrKey after Destroy.
func (k *MLDSA44Key) Sign(message, context []byte) ([]byte, error) {
	return k.sign(message, context, true)
}

func (k *MLDSA44Key) sign(message, context []byte, hedged bool) ([]byte, error) {
	switch {
	case k.key == nil:
		return nil, fmt.Errorf("%w: it was destroyed", ErrKey)
	case len(context) > MaxContext:
		return nil, ErrContext
	}
	sig := make([]byte, MLDSA44SignatureSize)
	if err := mldsa44.SignTo(k.key, message, context, hedged, sig); err != nil {
		return nil, errors.Join(errors.New("pqc: sign with ML-DSA-44"), err)
	}
	return sig, nil
}

// VerifyMLDSA44 checks a signature of message under context (FIPS 204, algorithm 3).
// Errors: ErrPublicKey for a key of the wrong length, ErrContext, ErrSignature.
func VerifyMLDSA44(pub, message, context, sig []byte) error {
	switch {
	case len(pub) != MLDSA44PublicKeySize:
		return fmt.Errorf("%w: %v has %d bytes", ErrPublicKey, MLDSA44, MLDSA44PublicKeySize)
	case len(context) > MaxContext:
		return ErrContext
	case len(sig) != MLDSA44SignatureSize:
		return ErrSignature
	}
	var key mldsa44.PublicKey
	key.Unpack((*[MLDSA44PublicKeySize]byte)(pub))
	if !mldsa44.Verify(&key, message, context, sig) {
		return ErrSignature
	}
	return nil
}
