package kms

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"math/big"
	"strings"
)

// ReceiptPrefix begins every ReceiptMessage. Nothing else that begins with it is
// ever signed with a key of the service.
const ReceiptPrefix = "conclave/receipt/1\x00"

// ReceiptMessage is what a node signs with a new version of a sign key of
// protection Hardware to prove that its device can use it: ReceiptPrefix, then
// cluster, keyring, key id, version (4 bytes) and node, each but the version
// preceded by its length; numbers are 32 bits, big endian. It is hashed as any
// message that the key signs.
func ReceiptMessage(cluster, keyring string, id KeyID, version uint32, node string) []byte {
	b := []byte(ReceiptPrefix)
	for _, s := range []string{cluster, keyring, string(id[:])} {
		b = append(binary.BigEndian.AppendUint32(b, uint32(len(s))), s...)
	}
	b = binary.BigEndian.AppendUint32(b, version)
	return append(binary.BigEndian.AppendUint32(b, uint32(len(node))), node...)
}

// ReservedMessage reports whether a message is one that only receipts may be
// signed over.
func ReservedMessage(message []byte) bool { return strings.HasPrefix(string(message), ReceiptPrefix) }

// VerifyReceipt checks the signature of a ReceiptMessage by a key version: public
// is the version's SEC1 uncompressed point, signature r‖s, each as long as the
// curve's order and from 1 to the order less 1 (FIPS 186-5, section 6.4.2), over
// the message hashed by SHA-256 (ECDSAP256) or SHA-384 (ECDSAP384). Errors:
// Invalid for another algorithm or a public key that is not one of it,
// BadSignature.
func VerifyReceipt(alg Algorithm, public, message, signature []byte) error {
	var curve elliptic.Curve
	var digest []byte
	switch alg {
	case ECDSAP256:
		sum := sha256.Sum256(message)
		curve, digest = elliptic.P256(), sum[:]
	case ECDSAP384:
		sum := sha512.Sum384(message)
		curve, digest = elliptic.P384(), sum[:]
	default:
		return Errorf(Invalid, "receipts are not signed with %s", alg)
	}
	key, err := ecdsa.ParseUncompressedPublicKey(curve, public)
	if err != nil {
		return Wrap(Invalid, err, "the public key is not one of "+string(alg), "")
	}
	bad := Errorf(BadSignature, "the receipt's signature by the new version does not verify")
	size := (curve.Params().BitSize + 7) / 8
	if len(signature) != 2*size {
		return bad
	}
	r, s := new(big.Int).SetBytes(signature[:size]), new(big.Int).SetBytes(signature[size:])
	if order := curve.Params().N; r.Sign() == 0 || s.Sign() == 0 || r.Cmp(order) >= 0 || s.Cmp(order) >= 0 {
		return bad
	}
	if !ecdsa.Verify(key, digest, r, s) {
		return bad
	}
	return nil
}
