package attest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/sha256"
	"crypto/sha512"
	"fmt"
	"hash"
	"math/big"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/kms"
)

// decode reads a TPM structure that is exactly what the TPM would marshal. The
// library panics on some malformed ones: those are refused too.
func decode[T tpm2.Marshallable, P interface {
	*T
	tpm2.Unmarshallable
}](b []byte) (v *T, err error) {
	defer func() {
		if r := recover(); r != nil {
			v, err = nil, fmt.Errorf("%v", r)
		}
	}()
	if v, err = tpm2.Unmarshal[T, P](b); err != nil {
		return nil, err
	}
	if !bytes.Equal(tpm2.Marshal(P(v)), b) {
		return nil, fmt.Errorf("not in the form that a TPM writes")
	}
	return v, nil
}

// newHash returns the hash of the algorithms that device keys use; nil for others.
func newHash(alg tpm2.TPMIAlgHash) hash.Hash {
	switch alg {
	case tpm2.TPMAlgSHA256:
		return sha256.New()
	case tpm2.TPMAlgSHA384:
		return sha512.New384()
	}
	return nil
}

// key is a public area with its name.
type key struct {
	public *tpm2.TPMTPublic
	name   []byte // name algorithm ‖ hash of the public area (TPM 2.0 part 1, section 16)
	point  []byte // SEC1 uncompressed
}

// readKey parses the public area of an elliptic curve key that was made in a TPM
// and cannot leave it.
func readKey(what string, area []byte) (key, error) {
	pub, err := decode[tpm2.TPMTPublic](area)
	if err != nil {
		return key{}, invalid("the %s key is not a TPMT_PUBLIC", what)
	}
	a := pub.ObjectAttributes
	if !a.FixedTPM || !a.FixedParent || !a.SensitiveDataOrigin {
		return key{}, invalid("the %s key is not one that was made in a TPM and is fixed to it (fixedTPM, fixedParent, sensitiveDataOrigin)", what)
	}
	h := newHash(pub.NameAlg)
	if h == nil {
		return key{}, invalid("the name of the %s key is of hash algorithm %#x, which is not SHA-256 or SHA-384", what, uint16(pub.NameAlg))
	}
	_, _ = h.Write(area)
	k := key{public: pub, name: h.Sum([]byte{byte(pub.NameAlg >> 8), byte(pub.NameAlg)})}
	if k.point, err = pointOf(pub); err != nil {
		return key{}, kms.Wrap(kms.Invalid, err, "the "+what+" key is not a point on P-256 or P-384", "")
	}
	return k, nil
}

func curveOf(id tpm2.TPMECCCurve) elliptic.Curve {
	switch id {
	case tpm2.TPMECCNistP256:
		return elliptic.P256()
	case tpm2.TPMECCNistP384:
		return elliptic.P384()
	}
	return nil
}

// pointOf returns the SEC1 uncompressed point of a public area on P-256 or P-384.
func pointOf(pub *tpm2.TPMTPublic) ([]byte, error) {
	parms, err := pub.Parameters.ECCDetail()
	if err != nil {
		return nil, err
	}
	unique, err := pub.Unique.ECC()
	if err != nil {
		return nil, err
	}
	curve := curveOf(parms.CurveID)
	if curve == nil {
		return nil, fmt.Errorf("curve %#x", uint16(parms.CurveID))
	}
	size := (curve.Params().BitSize + 7) / 8
	x, y := new(big.Int).SetBytes(unique.X.Buffer), new(big.Int).SetBytes(unique.Y.Buffer)
	if x.BitLen() > 8*size || y.BitLen() > 8*size {
		return nil, fmt.Errorf("a coordinate is too long")
	}
	point := make([]byte, 1+2*size)
	point[0] = 4
	x.FillBytes(point[1 : 1+size])
	y.FillBytes(point[1+size:])
	if _, err := ecdsa.ParseUncompressedPublicKey(curve, point); err != nil {
		return nil, err
	}
	return point, nil
}

// attestationKey parses the key that signs only what its TPM has made.
func (t *TPM) attestationKey() (key, error) {
	k, err := readKey("attestation", t.AK)
	if err != nil {
		return key{}, err
	}
	a := k.public.ObjectAttributes
	if !a.Restricted || !a.SignEncrypt || a.Decrypt {
		return key{}, invalid("the attestation key is not a restricted signing key")
	}
	return k, nil
}

// statement checks a TPMS_ATTEST: that a TPM generated it, and the attestation
// key's ECDSA signature.
func (k key) statement(what string, attest, signature []byte) (*tpm2.TPMSAttest, error) {
	a, err := decode[tpm2.TPMSAttest](attest)
	if err != nil || a.Magic != tpm2.TPMGeneratedValue {
		return nil, invalid("the %s is not a TPMS_ATTEST that a TPM has generated", what)
	}
	s, err := decode[tpm2.TPMTSignature](signature)
	if err != nil {
		return nil, invalid("the signature of the %s is not a TPMT_SIGNATURE", what)
	}
	if err := k.checkScheme(s); err != nil {
		return nil, invalid("the signature of the %s is not of the attestation key's scheme, ECDSA with SHA-256 or SHA-384", what)
	}
	ecc, err := s.Signature.ECDSA()
	if err != nil {
		return nil, invalid("the signature of the %s is not ECDSA", what)
	}
	parms, err := k.public.Parameters.ECCDetail()
	if err != nil {
		return nil, invalid("the attestation key is not an elliptic curve key")
	}
	pub, err := ecdsa.ParseUncompressedPublicKey(curveOf(parms.CurveID), k.point)
	if err != nil {
		return nil, invalid("the attestation key is not a point")
	}
	h := newHash(ecc.Hash)
	_, _ = h.Write(attest)
	sr, ss := new(big.Int).SetBytes(ecc.SignatureR.Buffer), new(big.Int).SetBytes(ecc.SignatureS.Buffer)
	if !ecdsa.Verify(pub, h.Sum(nil), sr, ss) {
		return nil, kms.Errorf(kms.BadSignature, "the attestation key's signature of the %s does not verify", what)
	}
	return a, nil
}

// checkScheme compares the signature's scheme with the one that the key is bound to.
func (k key) checkScheme(s *tpm2.TPMTSignature) error {
	if s.SigAlg != tpm2.TPMAlgECDSA {
		return fmt.Errorf("algorithm %#x", uint16(s.SigAlg))
	}
	ecc, err := s.Signature.ECDSA()
	if err != nil {
		return err
	}
	parms, err := k.public.Parameters.ECCDetail()
	if err != nil {
		return err
	}
	bound, err := parms.Scheme.Details.ECDSA()
	if err != nil || parms.Scheme.Scheme != tpm2.TPMAlgECDSA || bound.HashAlg != ecc.Hash || newHash(ecc.Hash) == nil {
		return fmt.Errorf("another scheme or hash")
	}
	return nil
}
