package tpm

import (
	"bytes"
	"crypto/ecdh"
	"crypto/elliptic"

	"github.com/google/go-tpm/tpm2"
)

// suite is what follows from the curve.
type suite struct {
	curve   ecdh.Curve
	name    string
	id      tpm2.TPMECCCurve
	hash    tpm2.TPMIAlgHash
	field   int // bytes of a coordinate
	digest  int // bytes of a digest to be signed, and of an object's unique field
	aesBits tpm2.TPMKeyBits
}

func (s *suite) elliptic() elliptic.Curve {
	if s.curve == ecdh.P256() {
		return elliptic.P256()
	}
	return elliptic.P384()
}

func suiteOf(curve ecdh.Curve) *suite {
	if curve == ecdh.P256() {
		return &suite{curve, "P-256", tpm2.TPMECCNistP256, tpm2.TPMAlgSHA256, 32, 32, 128}
	}
	return &suite{curve, "P-384", tpm2.TPMECCNistP384, tpm2.TPMAlgSHA384, 48, 48, 256}
}

func (s *suite) ecc(attr tpm2.TPMAObject, sym tpm2.TPMTSymDefObject, scheme tpm2.TPMTECCScheme) tpm2.TPMTPublic {
	attr.FixedTPM, attr.FixedParent, attr.SensitiveDataOrigin = true, true, true
	attr.UserWithAuth, attr.NoDA = true, true
	return tpm2.TPMTPublic{
		Type:             tpm2.TPMAlgECC,
		NameAlg:          s.hash,
		ObjectAttributes: attr,
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
			Symmetric: sym,
			Scheme:    scheme,
			CurveID:   s.id,
			KDF:       tpm2.TPMTKDFScheme{Scheme: tpm2.TPMAlgNull},
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{}),
	}
}

func noSymmetric() tpm2.TPMTSymDefObject { return tpm2.TPMTSymDefObject{Algorithm: tpm2.TPMAlgNull} }

// storage is a restricted decryption key: it protects children and nothing else.
func (s *suite) storage() tpm2.TPMTPublic {
	return s.ecc(tpm2.TPMAObject{Restricted: true, Decrypt: true},
		tpm2.TPMTSymDefObject{
			Algorithm: tpm2.TPMAlgAES,
			KeyBits:   tpm2.NewTPMUSymKeyBits(tpm2.TPMAlgAES, s.aesBits),
			Mode:      tpm2.NewTPMUSymMode(tpm2.TPMAlgAES, tpm2.TPMAlgCFB),
		},
		tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgNull})
}

// agreement may do ECDH and nothing else.
func (s *suite) agreement() tpm2.TPMTPublic {
	return s.ecc(tpm2.TPMAObject{Decrypt: true}, noSymmetric(), tpm2.TPMTECCScheme{
		Scheme:  tpm2.TPMAlgECDH,
		Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDH, &tpm2.TPMSKeySchemeECDH{HashAlg: s.hash}),
	})
}

// signing may do ECDSA with the suite's hash and nothing else.
func (s *suite) signing() tpm2.TPMTPublic {
	return s.ecc(tpm2.TPMAObject{SignEncrypt: true}, noSymmetric(), tpm2.TPMTECCScheme{
		Scheme:  tpm2.TPMAlgECDSA,
		Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: s.hash}),
	})
}

// attestation may sign what the TPM itself says and nothing else.
func (s *suite) attestation() tpm2.TPMTPublic {
	pub := s.signing()
	pub.ObjectAttributes.Restricted = true
	return pub
}

// sealed is a data object: no key, no use but TPM2_Unseal.
func (s *suite) sealed() tpm2.TPMTPublic {
	return tpm2.TPMTPublic{
		Type:             tpm2.TPMAlgKeyedHash,
		NameAlg:          s.hash,
		ObjectAttributes: tpm2.TPMAObject{FixedTPM: true, FixedParent: true, UserWithAuth: true, NoDA: true},
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgKeyedHash, &tpm2.TPMSKeyedHashParms{
			Scheme: tpm2.TPMTKeyedHashScheme{Scheme: tpm2.TPMAlgNull},
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgKeyedHash, &tpm2.TPM2BDigest{}),
	}
}

// sameTemplate reports whether pub is want in everything but its unique field.
func sameTemplate(pub, want tpm2.TPMTPublic) bool {
	if pub.Type != want.Type {
		return false
	}
	pub.Unique = want.Unique
	return bytes.Equal(tpm2.Marshal(pub), tpm2.Marshal(want))
}

// checkKey refuses a key that is not exactly the template, and says so where only
// the configured PCRs are the reason.
func (d *Device) checkKey(what string, o *object, want tpm2.TPMTPublic) error {
	s := d.suite
	if len(d.cfg.PCRs) > 0 && (sameTemplate(o.public, s.agreement()) || sameTemplate(o.public, s.signing())) {
		return unsafe("%s at %#x was made without PCRs: remove them from the configuration, or replace the node's root by one made with them", what, uint32(o.handle))
	}
	if len(d.cfg.PCRs) == 0 && (sameTemplate(o.public, d.bound(s.agreement())) || sameTemplate(o.public, d.bound(s.signing()))) {
		return unsafe("%s at %#x was made with PCRs: name them in the configuration", what, uint32(o.handle))
	}
	return s.checkKey(what, o, want)
}

// checkKey refuses a key that is not exactly the template, saying what differs.
func (s *suite) checkKey(what string, o *object, want tpm2.TPMTPublic) error {
	if sameTemplate(o.public, want) {
		return nil
	}
	if o.public.Type != tpm2.TPMAlgECC {
		return unsafe("%s at %#x is not an elliptic curve key", what, uint32(o.handle))
	}
	if o.public.ObjectAttributes != want.ObjectAttributes {
		return unsafe("%s at %#x has other attributes than required (%+v)", what, uint32(o.handle), o.public.ObjectAttributes)
	}
	if p, err := o.public.Parameters.ECCDetail(); err == nil && p.CurveID != s.id {
		return unsafe("%s at %#x is not on the configured curve %s", what, uint32(o.handle), s.name)
	}
	return unsafe("%s at %#x has another name algorithm, policy, scheme or cipher than required", what, uint32(o.handle))
}

// publicKey converts the public point; ecdh refuses one off the curve.
func (s *suite) publicKey(o *object) (*ecdh.PublicKey, error) {
	p, err := o.public.Unique.ECC()
	if err != nil {
		return nil, err
	}
	raw := make([]byte, 1+2*s.field)
	raw[0] = 4
	if !leftPad(raw[1:1+s.field], p.X.Buffer) || !leftPad(raw[1+s.field:], p.Y.Buffer) {
		return nil, unsafe("public point at %#x is too long", uint32(o.handle))
	}
	pub, err := s.curve.NewPublicKey(raw)
	if err != nil {
		return nil, unsafe("public point at %#x is not on %s", uint32(o.handle), s.name)
	}
	return pub, nil
}

// leftPad writes b right-aligned into dst; a TPM may drop leading zeros.
func leftPad(dst, b []byte) bool {
	for len(b) > len(dst) {
		if b[0] != 0 {
			return false
		}
		b = b[1:]
	}
	clear(dst[:len(dst)-len(b)])
	copy(dst[len(dst)-len(b):], b)
	return true
}
