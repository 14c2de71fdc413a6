package keyring

import (
	"context"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
)

// EntropySize is how many bytes of entropy one key is made from.
const EntropySize = 64

// Random is the generator of a device.
type Random interface {
	Random(ctx context.Context, b []byte) error
}

// Entropy returns EntropySize bytes from the device's generator XOR as many
// from the system's: unpredictable as long as one of the two is. The caller
// destroys it. A device that does not answer is kms.Unavailable: the system's
// generator never stands in for it.
func Entropy(ctx context.Context, dev Random) (*secret.Bytes, error) {
	s, err := newSecret(EntropySize)
	if err != nil {
		return nil, err
	}
	var own [EntropySize]byte
	defer secret.Wipe(own[:])
	if err := dev.Random(ctx, s.Reveal()); err != nil {
		s.Destroy()
		return nil, deviceError(err, "give random bytes")
	}
	rand.Read(own[:])
	subtle.XORBytes(s.Reveal(), s.Reveal(), own[:])
	return s, nil
}

// materialSize returns the length of an algorithm's material in bytes, 0 for an
// unknown one.
func materialSize(a kms.Algorithm) int {
	switch a {
	case kms.AES256GCM, kms.HMACSHA256, kms.ECDSAP256, kms.Ed25519:
		return 32
	case kms.ECDSAP384:
		return 48
	}
	return 0
}

func checkAlgorithm(p kms.Purpose, a kms.Algorithm) error {
	if !slices.Contains(p.Algorithms(), a) {
		return kms.Errorf(kms.Invalid, "algorithm %q is not for purpose %q", string(a), string(p))
	}
	return nil
}

// GenerateKEK makes a KEK from EntropySize bytes of entropy. The caller
// destroys it.
func GenerateKEK(entropy []byte) (*secret.Bytes, error) {
	return expand(entropy, "kek", 0, KEKSize)
}

// Generate makes the material of a new key version from EntropySize bytes of
// entropy, and for a sign key its public key: the SEC1 uncompressed point, or
// the 32 bytes of RFC 8032. The material has the form that kms.Algorithm
// documents; the caller destroys it. An unknown algorithm or too little entropy
// is kms.Invalid.
func Generate(algorithm kms.Algorithm, entropy []byte) (material *secret.Bytes, publicKey []byte, err error) {
	size := materialSize(algorithm)
	if size == 0 {
		return nil, nil, kms.Errorf(kms.Invalid, "unknown algorithm %q", string(algorithm))
	}
	cleanStack()
	defer cleanStack()
	// An EC scalar must lie in [1, n-1]: testing candidates, FIPS 186-5 A.2.2.
	// One candidate in 2^32 fails on P-256; sixteen in a row do not happen.
	for attempt := uint32(0); attempt < 16; attempt++ {
		material, err = expand(entropy, string(algorithm), attempt, size)
		if err != nil {
			return nil, nil, err
		}
		publicKey, err = publicKeyOf(algorithm, material)
		if err == nil {
			return material, publicKey, nil
		}
		material.Destroy()
	}
	return nil, nil, kms.Wrap(kms.Internal, err, "no key could be made from this entropy", "")
}

// expand derives n bytes from entropy with HMAC-SHA-512.
func expand(entropy []byte, what string, attempt uint32, n int) (*secret.Bytes, error) {
	if len(entropy) != EntropySize {
		return nil, kms.Errorf(kms.Invalid, "a key needs %d bytes of entropy, not %d", EntropySize, len(entropy))
	}
	s, err := newSecret(n)
	if err != nil {
		return nil, err
	}
	derive512(entropy, labelGenerate, binary.BigEndian.AppendUint32([]byte(what), attempt), s.Reveal())
	return s, nil
}

// publicKeyOf returns the public key of a sign key's material, nil for the
// algorithms that have none.
func publicKeyOf(a kms.Algorithm, material *secret.Bytes) ([]byte, error) {
	signer, err := parseSigner(a, material)
	if err != nil || signer == nil {
		return nil, err
	}
	defer signer.wipe()
	return signer.public()
}

// signer is a sign key ready for use. Its parsed form is in ordinary memory,
// for that is where the standard library needs it.
type signer struct {
	ecdsa   *ecdsa.PrivateKey
	ed25519 ed25519.PrivateKey
}

func curveOf(a kms.Algorithm) elliptic.Curve {
	if a == kms.ECDSAP384 {
		return elliptic.P384()
	}
	return elliptic.P256()
}

// parseSigner returns nil without error for an algorithm that does not sign.
func parseSigner(a kms.Algorithm, material *secret.Bytes) (*signer, error) {
	switch a {
	case kms.ECDSAP256, kms.ECDSAP384:
		key, err := ecdsa.ParseRawPrivateKey(curveOf(a), material.Reveal())
		if err != nil {
			return nil, kms.Wrap(kms.Invalid, err, "material is not a private scalar of "+string(a), "")
		}
		return &signer{ecdsa: key}, nil
	case kms.Ed25519:
		if material.Len() != ed25519.SeedSize {
			return nil, kms.Errorf(kms.Invalid, "an Ed25519 seed has %d bytes, not %d", ed25519.SeedSize, material.Len())
		}
		return &signer{ed25519: ed25519.NewKeyFromSeed(material.Reveal())}, nil
	}
	return nil, nil
}

func (s *signer) wipe() { secret.Wipe(s.ed25519) }

func (s *signer) public() ([]byte, error) {
	if s.ecdsa == nil {
		return slices.Clone([]byte(s.ed25519.Public().(ed25519.PublicKey))), nil
	}
	b, err := s.ecdsa.PublicKey.Bytes()
	if err != nil {
		return nil, kms.Wrap(kms.Internal, err, "public key cannot be encoded", "")
	}
	return b, nil
}
