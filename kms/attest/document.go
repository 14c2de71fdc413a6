package attest

import (
	"crypto/sha256"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
)

// Format is the format of documents of this program.
const Format uint8 = 1

// Bounds of a document's parts, in bytes where nothing else is said.
const (
	maxChain     = 8       // certificates
	maxPart      = 4 << 10 // a certificate, public area, statement or signature
	maxVendor    = 48 << 10
	maxKeys      = 8  // keys of a PKCS#11 document
	maxFacts     = 64 // attributes of a key
	maxFactBytes = 255
	maxPCR       = 23 // highest PCR of a PC client TPM
)

// Document is an attestation document: exactly the part that Kind names.
type Document struct {
	Format uint8   `cbor:"format"`
	Kind   string  `cbor:"kind"`
	TPM    *TPM    `cbor:"tpm,omitempty"`
	PKCS11 *PKCS11 `cbor:"pkcs11,omitempty"`
}

// TPM is the document of a TPM 2.0. The TPM structures are marshalled as TPM 2.0
// part 2 has them.
type TPM struct {
	EKCertificate []byte    `cbor:"ek-certificate"` // DER; empty: the TPM has none
	EKChain       [][]byte  `cbor:"ek-chain"`       // DER, between EKCertificate and the vendor's
	EKPublic      []byte    `cbor:"ek-public"`      // TPMT_PUBLIC of the endorsement key
	AK            []byte    `cbor:"ak"`             // TPMT_PUBLIC of the attestation key, ECDSA
	Storage       Certified `cbor:"storage"`
	Agreement     Certified `cbor:"agreement"`
	Signing       Certified `cbor:"signing"`
	Quote         Quoted    `cbor:"quote"`
	Witness       *Witness  `cbor:"witness,omitempty"`
}

// Certified is a key with the attestation key's certification (TPM2_Certify).
type Certified struct {
	Public    []byte `cbor:"public"`    // TPMT_PUBLIC
	Attest    []byte `cbor:"attest"`    // TPMS_ATTEST
	Signature []byte `cbor:"signature"` // TPMT_SIGNATURE
}

// Quoted is a quote (TPM2_Quote) of the SHA-256 bank.
type Quoted struct {
	Attest    []byte `cbor:"attest"`    // TPMS_ATTEST
	Signature []byte `cbor:"signature"` // TPMT_SIGNATURE
	PCRs      []PCR  `cbor:"pcrs"`      // the quoted ones, in order
}

// PCR is the value of a platform configuration register.
type PCR struct {
	Index uint8  `cbor:"index"`
	Value []byte `cbor:"value"` // 32 bytes
}

// Witness is the statement of a node of another site that the holder of the
// endorsement key holds the attestation key in the same TPM
// (TPM2_MakeCredential, TPM2_ActivateCredential).
type Witness struct {
	Node      string `cbor:"node"`
	Secret    []byte `cbor:"secret"`    // SHA-256 of the secret of the challenge
	Signature []byte `cbor:"signature"` // by the witness's signing key, over WitnessMessage in WitnessContext
}

// PKCS11 is the document of a PKCS#11 token: the node's word, but for what the
// vendor's blob may prove to the vendor's tool.
type PKCS11 struct {
	Subject []byte      `cbor:"subject"` // Qualifying
	Keys    []PKCS11Key `cbor:"keys"`    // in order of Role
	Vendor  []byte      `cbor:"vendor"`  // the vendor's own attestation; empty: none
}

// PKCS11Key is what the token said of one of the device keys.
type PKCS11Key struct {
	Role  string `cbor:"role"`  // agreement, signing, wrapping
	Facts []Fact `cbor:"facts"` // in order of Name
}

// Fact is an attribute of a key as the token returned it.
type Fact struct {
	Name  string `cbor:"name"`  // CKA_LOCAL, ...
	Value string `cbor:"value"` // true, false, or words
}

// Marshal returns the document with t in it.
func (t TPM) Marshal() []byte { return canon.Marshal(Document{Format: Format, Kind: KindTPM, TPM: &t}) }

// Marshal returns the document with p in it.
func (p PKCS11) Marshal() []byte {
	return canon.Marshal(Document{Format: Format, Kind: KindPKCS11, PKCS11: &p})
}

// Parse decodes a document and checks its shape. Errors: kms.TooLarge,
// kms.Invalid.
func Parse(b []byte) (Document, error) {
	if len(b) > MaxDocument {
		return Document{}, kms.Errorf(kms.TooLarge, "the attestation document has %d bytes; the limit is %d", len(b), MaxDocument)
	}
	var d Document
	if err := canon.Unmarshal(b, &d); err != nil {
		return Document{}, kms.Wrap(kms.Invalid, err, "the attestation document is not in canonical form", "")
	}
	if d.Format != Format {
		return Document{}, invalid("the attestation document has format %d; this program knows %d", d.Format, Format)
	}
	switch {
	case d.Kind == KindTPM && d.TPM != nil && d.PKCS11 == nil:
		return d, d.TPM.check()
	case d.Kind == KindPKCS11 && d.PKCS11 != nil && d.TPM == nil:
		return d, d.PKCS11.check()
	}
	return Document{}, invalid("the attestation document of kind %q has other parts than that kind, or the kind is not known", d.Kind)
}

// WithWitness returns the document of a TPM with the witness's statement in it.
// Verify says whether it holds. Errors: those of Parse, kms.Invalid for a document
// that takes no witness.
func WithWitness(doc []byte, w Witness) ([]byte, error) {
	d, err := Parse(doc)
	if err != nil {
		return nil, err
	}
	if d.Kind != KindTPM {
		return nil, invalid("a document of kind %q takes no witness: only that of a TPM does", d.Kind)
	}
	d.TPM.Witness = &w
	if err := d.TPM.check(); err != nil {
		return nil, err
	}
	return d.TPM.Marshal(), nil
}

func (t *TPM) check() error {
	if len(t.EKChain) > maxChain {
		return invalid("the endorsement key certificate comes with %d others; the limit is %d", len(t.EKChain), maxChain)
	}
	parts := [][]byte{t.EKCertificate, t.EKPublic, t.AK, t.Quote.Attest, t.Quote.Signature}
	for _, c := range []Certified{t.Storage, t.Agreement, t.Signing} {
		parts = append(parts, c.Public, c.Attest, c.Signature)
	}
	for _, p := range slices.Concat(parts, t.EKChain) {
		if len(p) > maxPart {
			return invalid("a part of the attestation document has %d bytes; the limit is %d", len(p), maxPart)
		}
	}
	for i, p := range t.Quote.PCRs {
		if p.Index > maxPCR || len(p.Value) != sha256.Size || i > 0 && p.Index <= t.Quote.PCRs[i-1].Index {
			return invalid("the PCR values of the quote are not 32 bytes each, of registers 0 to %d in order", maxPCR)
		}
	}
	if w := t.Witness; w != nil {
		if err := kms.CheckName("witness", w.Node); err != nil {
			return err
		}
		if len(w.Secret) != sha256.Size || len(w.Signature) > maxPart {
			return invalid("the statement of witness %s is malformed", w.Node)
		}
	}
	return nil
}

func (p *PKCS11) check() error {
	if len(p.Subject) != sha256.Size || len(p.Keys) > maxKeys || len(p.Vendor) > maxVendor {
		return invalid("the PKCS#11 attestation document is malformed: its subject is no hash, or it has more than %d keys or %d bytes of vendor attestation", maxKeys, maxVendor)
	}
	for i, k := range p.Keys {
		if !plain(k.Role) || i > 0 && k.Role <= p.Keys[i-1].Role || len(k.Facts) > maxFacts {
			return invalid("the keys of the PKCS#11 attestation document are not in order of their role, or have more than %d attributes", maxFacts)
		}
		for j, f := range k.Facts {
			if !plain(f.Name) || !plain(f.Value) || j > 0 && f.Name <= k.Facts[j-1].Name {
				return invalid("the attributes of the %s key in the PKCS#11 attestation document are not plain words in order", k.Role)
			}
		}
	}
	return nil
}

// plain reports whether s is a short line of printable ASCII.
func plain(s string) bool {
	return s != "" && len(s) <= maxFactBytes && !slices.ContainsFunc([]byte(s), func(c byte) bool { return c < 0x20 || c > 0x7e })
}
