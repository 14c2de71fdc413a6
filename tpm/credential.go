package tpm

import (
	"bytes"
	"crypto/rand"
	"encoding/binary"
	"fmt"

	"github.com/google/go-tpm/tpm2"
)

// maxPublicArea is the longest public area that is looked at: RSA-4096 needs
// less.
const maxPublicArea = 1024

// MakeCredential encrypts a secret for an endorsement key so that
// TPM2_ActivateCredential gives it out only where that key and an object of
// the given name are in one TPM (TPM 2.0 Part 1, 24; Part 3, 12.6).
// ekPublic is a marshalled TPMT_PUBLIC of a restricted decryption key, RSA with
// 2048 to 4096 bits or ECC on a NIST curve; akName is a name with its algorithm
// in front; secret has 1 byte to the length of the endorsement key's name
// digest. It returns the content of TPM2B_ID_OBJECT and of
// TPM2B_ENCRYPTED_SECRET. Errors: ErrInvalid.
func MakeCredential(ekPublic, akName, secret []byte) (credential, encryptedSecret []byte, err error) {
	pub, ok := parsePublic(ekPublic)
	if !ok || !isEndorsementKey(pub) {
		return nil, nil, invalid("not the public area of an endorsement key")
	}
	if !isName(akName) {
		return nil, nil, invalid("not the name of an object")
	}
	if most, _ := digestLen(pub.NameAlg); len(secret) < 1 || len(secret) > most {
		return nil, nil, invalid("the secret has %d bytes, this endorsement key takes 1 to %d", len(secret), most)
	}
	key, err := tpm2.ImportEncapsulationKey(pub)
	if err != nil {
		return nil, nil, invalid("endorsement key: %v", err)
	}
	credential, encryptedSecret, err = tpm2.CreateCredential(rand.Reader, key, akName, secret)
	if err != nil {
		return nil, nil, fmt.Errorf("tpm: making a credential: %w", err)
	}
	return credential, encryptedSecret, nil
}

// parsePublic reads a TPMT_PUBLIC that is encoded in the one way there is.
func parsePublic(b []byte) (*tpm2.TPMTPublic, bool) {
	if len(b) == 0 || len(b) > maxPublicArea {
		return nil, false
	}
	pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](b)
	if err != nil || !bytes.Equal(tpm2.Marshal(pub), b) {
		return nil, false
	}
	return pub, true
}

// isEndorsementKey reports whether pub has what every endorsement key template
// has in common: it was made in its TPM, stays there, and only opens what was
// encrypted for it with a known structure.
func isEndorsementKey(pub *tpm2.TPMTPublic) bool {
	a := pub.ObjectAttributes
	if !a.FixedTPM || !a.FixedParent || !a.SensitiveDataOrigin || !a.Restricted || !a.Decrypt || a.SignEncrypt {
		return false
	}
	if _, ok := digestLen(pub.NameAlg); !ok {
		return false
	}
	switch pub.Type {
	case tpm2.TPMAlgRSA:
		p, err := pub.Parameters.RSADetail()
		if err != nil || p.Scheme.Scheme != tpm2.TPMAlgNull || !aesCFB(p.Symmetric) {
			return false
		}
		n, err := pub.Unique.RSA()
		return err == nil && (p.Exponent == 0 || p.Exponent == 65537) && p.KeyBits >= 2048 && p.KeyBits <= 4096 &&
			len(n.Buffer)*8 == int(p.KeyBits) && n.Buffer[0]&0x80 != 0
	case tpm2.TPMAlgECC:
		p, err := pub.Parameters.ECCDetail()
		return err == nil && p.Scheme.Scheme == tpm2.TPMAlgNull && aesCFB(p.Symmetric)
	}
	return false
}

func aesCFB(s tpm2.TPMTSymDefObject) bool {
	if s.Algorithm != tpm2.TPMAlgAES {
		return false
	}
	bits, err := s.KeyBits.AES()
	if err != nil || *bits != 128 && *bits != 256 {
		return false
	}
	mode, err := s.Mode.AES()
	return err == nil && *mode == tpm2.TPMAlgCFB
}

// digestLen is the length of a name algorithm's digest.
func digestLen(alg tpm2.TPMIAlgHash) (int, bool) {
	switch alg {
	case tpm2.TPMAlgSHA256:
		return 32, true
	case tpm2.TPMAlgSHA384:
		return 48, true
	case tpm2.TPMAlgSHA512:
		return 64, true
	}
	return 0, false
}

func isName(b []byte) bool {
	if len(b) < 2 {
		return false
	}
	n, ok := digestLen(tpm2.TPMIAlgHash(binary.BigEndian.Uint16(b)))
	return ok && len(b) == 2+n
}
