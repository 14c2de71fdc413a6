package keyring

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"

	"github.com/conclave-kms/conclave/kms"
)

// errSignature is the one error for a signature that does not verify.
var errSignature error = &kms.Error{Kind: kms.BadSignature, Msg: "the signature does not verify with this key and message"}

// digest returns the hash that an ECDSA algorithm signs (FIPS 186-5).
func digest(a kms.Algorithm, message []byte) []byte {
	if a == kms.ECDSAP384 {
		d := sha512.Sum384(message)
		return d[:]
	}
	d := sha256.Sum256(message)
	return d[:]
}

func (s *signer) sign(a kms.Algorithm, message []byte) ([]byte, error) {
	cleanStack()
	defer cleanStack()
	if s.ecdsa == nil {
		return ed25519.Sign(s.ed25519, message), nil
	}
	sig, err := ecdsa.SignASN1(rand.Reader, s.ecdsa, digest(a, message))
	if err != nil {
		return nil, kms.Wrap(kms.Internal, err, "signing failed", "")
	}
	return sig, nil
}

// Verify checks a signature with the public key alone. ECDSA: SEC1 uncompressed
// point, SHA-256 or SHA-384 of the message, signature in ASN.1 DER (RFC 3279,
// section 2.2.3). Ed25519: 32-byte key, 64-byte signature (RFC 8032). A
// signature that does not verify is kms.BadSignature, an unusable algorithm or
// public key kms.Invalid.
func Verify(algorithm kms.Algorithm, publicKey, message, sig []byte) error {
	ok := false
	switch algorithm {
	case kms.ECDSAP256, kms.ECDSAP384:
		pub, err := ecdsa.ParseUncompressedPublicKey(curveOf(algorithm), publicKey)
		if err != nil {
			return kms.Wrap(kms.Invalid, err, "public key is not an uncompressed point of "+string(algorithm), "")
		}
		ok = ecdsa.VerifyASN1(pub, digest(algorithm, message), sig)
	case kms.Ed25519:
		if len(publicKey) != ed25519.PublicKeySize {
			return kms.Errorf(kms.Invalid, "an Ed25519 public key has %d bytes, not %d", ed25519.PublicKeySize, len(publicKey))
		}
		ok = ed25519.Verify(publicKey, message, sig)
	default:
		return kms.Errorf(kms.Invalid, "algorithm %q has no signatures", string(algorithm))
	}
	if !ok {
		return errSignature
	}
	return nil
}
