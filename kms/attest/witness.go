package attest

import (
	"crypto/hmac"
	"crypto/sha256"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/pqc"
)

// WitnessContext is the signature context of witnesses' statements.
const WitnessContext = "conclave/attest/v1"

// witnessed is what a witness signs, in canonical encoding.
type witnessed struct {
	Format        uint8  `cbor:"format"` // 1
	Witness       string `cbor:"witness"`
	Subject       []byte `cbor:"subject"`        // Qualifying
	EKCertificate []byte `cbor:"ek-certificate"` // SHA-256
	EKPublic      []byte `cbor:"ek-public"`      // SHA-256
	AKName        []byte `cbor:"ak-name"`
	Secret        []byte `cbor:"secret"` // SHA-256
}

// WitnessMessage is what node witness signs, in WitnessContext, after the holder
// of t's endorsement key has shown, with the secret whose SHA-256 is secretHash,
// that its attestation key lives in the same TPM. Errors: kms.Invalid for an
// attestation key that is not one.
func WitnessMessage(witness string, s Subject, t *TPM, secretHash []byte) ([]byte, error) {
	ak, err := t.attestationKey()
	if err != nil {
		return nil, err
	}
	cert, public := sha256.Sum256(t.EKCertificate), sha256.Sum256(t.EKPublic)
	return canon.Marshal(witnessed{
		Format: 1, Witness: witness, Subject: Qualifying(s), EKCertificate: cert[:], EKPublic: public[:], AKName: ak.name, Secret: secretHash,
	}), nil
}

// AKName is the name (TPM 2.0 part 1, section 16) of the attestation key, for
// which a witness makes the credential. Errors: kms.Invalid.
func (t *TPM) AKName() ([]byte, error) {
	ak, err := t.attestationKey()
	if err != nil {
		return nil, err
	}
	return ak.name, nil
}

// Answer is what the subject returns for a challenge: proof of the secret that
// its TPM has released, without showing it. 32 bytes: HMAC-SHA-256 under the
// secret over label, challenge and Qualifying(s).
func Answer(secret, challenge []byte, s Subject) []byte {
	m := hmac.New(sha256.New, secret)
	_, _ = m.Write([]byte("conclave/attest/answer/v1\x00"))
	id := sha256.Sum256(challenge)
	_, _ = m.Write(id[:])
	_, _ = m.Write(Qualifying(s))
	return m.Sum(nil)
}

// verify checks the statement about t and s.
func (w *Witness) verify(t *TPM, s Subject, c Context) (Subject, error) {
	if c.Witness == nil {
		return Subject{}, invalid("its witness %s is not known", w.Node)
	}
	by, ok := c.Witness(w.Node)
	switch {
	case !ok || by.Node != w.Node:
		return Subject{}, invalid("its witness %s is not known", w.Node)
	case by.Site == s.Site:
		return Subject{}, invalid("its witness %s is of the same site %s: a witness is a node of another site", w.Node, s.Site)
	}
	msg, err := WitnessMessage(w.Node, s, t, w.Secret)
	if err != nil {
		return Subject{}, err
	}
	if err := pqc.Verify(pqc.SuiteID(by.SigningSuite), by.Signing, msg, []byte(WitnessContext), w.Signature); err != nil {
		return Subject{}, kms.Wrap(kms.BadSignature, err, "the signature of its witness "+w.Node+" does not verify: the statement is about another document, or was altered", "have the witness make it again: conclaved attest challenge")
	}
	return by, nil
}
