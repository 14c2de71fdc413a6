// Package pqc is the cryptography that crosses a border: the table of every
// suite of the product, hybrid sealing (HPKE with ML-KEM and an elliptic curve,
// whose half may sit in a device), hybrid signatures (ML-DSA-65 and Ed25519),
// the one verifier for every signature suite, and the custodian key file.
package pqc

import (
	"errors"
	"fmt"
	"slices"
)

// SuiteID numbers a suite. KEM suites have their HPKE KEM identifier (IANA HPKE
// registry, draft-ietf-hpke-pq); all others have numbers of this product:
// 0xC1xx signatures, 0xC2xx authenticated encryption. A number is never reused.
type SuiteID uint16

// The suites.
const (
	MLKEM768P256  SuiteID = 0x0050 // ML-KEM-768 with P-256, HKDF-SHA256, AES-256-GCM
	MLKEM1024P384 SuiteID = 0x0051 // ML-KEM-1024 with P-384, HKDF-SHA384, AES-256-GCM
	XWing         SuiteID = 0x647a // ML-KEM-768 with X25519 (X-Wing), HKDF-SHA256, AES-256-GCM

	ECDSAP256SHA256 SuiteID = 0xC101 // ECDSA, P-256, SHA-256 (FIPS 186-5)
	ECDSAP384SHA384 SuiteID = 0xC102 // ECDSA, P-384, SHA-384 (FIPS 186-5)
	Ed25519         SuiteID = 0xC103 // PureEdDSA (RFC 8032)
	MLDSA65Ed25519  SuiteID = 0xC104 // id-MLDSA65-Ed25519-SHA512 (draft-ietf-lamps-pq-composite-sigs)

	// MLDSA44 is for cosignatures of checkpoints alone: nobody's credential and no
	// node's signing key.
	MLDSA44 SuiteID = 0xC105 // ML-DSA-44, pure (FIPS 204)

	CiphertextFormat1 SuiteID = 0xC201 // AES-256-GCM under keys derived per message, key-committing
)

// Kind is what a suite does.
type Kind uint8

// The kinds.
const (
	KEM Kind = iota + 1
	Signature
	AEAD
	Cosignature // of checkpoints, see MLDSA44
)

// String returns the kind's name.
func (k Kind) String() string {
	switch k {
	case KEM:
		return "kem"
	case Signature:
		return "signature"
	case AEAD:
		return "aead"
	case Cosignature:
		return "cosignature"
	}
	return fmt.Sprintf("kind(%d)", uint8(k))
}

// Suite is one row of the table. All sizes are in bytes; 0 means that the suite
// has no such thing.
type Suite struct {
	ID       SuiteID
	Name     string
	Kind     Kind
	Strength string // the security that the suite claims, for people and drift reports

	PublicKeySize int  // KEM: encapsulation key, then point; signature: see Verify
	SeedSize      int  // the secret from which a software key is made
	EncSize       int  // KEM: encapsulated key
	SignatureSize int  // signature: fixed length
	KeySize       int  // AEAD: key
	Overhead      int  // KEM: Seal's output less its input; AEAD: tag
	PostQuantum   bool // withstands a quantum adversary
}

// ErrSuite reports a suite that does not exist or is of another kind than the
// operation needs.
var ErrSuite = errors.New("pqc: unknown or unsuitable suite")

const gcmTag = 16

var suites = [...]Suite{
	{ID: MLKEM768P256, Name: "MLKEM768-P256", Kind: KEM, Strength: "NIST category 3 with P-256", PostQuantum: true,
		PublicKeySize: 1184 + 65, SeedSize: hpkeSeedSize, EncSize: 1088 + 65, Overhead: 2 + 1088 + 65 + gcmTag},
	{ID: MLKEM1024P384, Name: "MLKEM1024-P384", Kind: KEM, Strength: "NIST category 5 with P-384 (CNSA 2.0)", PostQuantum: true,
		PublicKeySize: 1568 + 97, SeedSize: hpkeSeedSize, EncSize: 1568 + 97, Overhead: 2 + 1568 + 97 + gcmTag},
	{ID: XWing, Name: "MLKEM768-X25519", Kind: KEM, Strength: "NIST category 3 with X25519", PostQuantum: true,
		PublicKeySize: 1184 + 32, SeedSize: hpkeSeedSize, EncSize: 1088 + 32, Overhead: 2 + 1088 + 32 + gcmTag},

	{ID: ECDSAP256SHA256, Name: "ECDSA-P256-SHA256", Kind: Signature, Strength: "128-bit classical",
		PublicKeySize: 65, SeedSize: 32, SignatureSize: 64},
	{ID: ECDSAP384SHA384, Name: "ECDSA-P384-SHA384", Kind: Signature, Strength: "192-bit classical",
		PublicKeySize: 97, SeedSize: 48, SignatureSize: 96},
	{ID: Ed25519, Name: "Ed25519", Kind: Signature, Strength: "128-bit classical",
		PublicKeySize: 32, SeedSize: 32, SignatureSize: 64},
	{ID: MLDSA65Ed25519, Name: "MLDSA65-Ed25519-SHA512", Kind: Signature, Strength: "NIST category 3 with Ed25519", PostQuantum: true,
		PublicKeySize: 1952 + 32, SeedSize: 64, SignatureSize: 3309 + 64},
	{ID: MLDSA44, Name: "ML-DSA-44", Kind: Cosignature, Strength: "NIST category 2", PostQuantum: true,
		PublicKeySize: 1312, SeedSize: 32, SignatureSize: 2420},

	{ID: CiphertextFormat1, Name: "AES-256-GCM-DERIVED-1", Kind: AEAD, Strength: "256-bit symmetric", PostQuantum: true,
		KeySize: 32, Overhead: gcmTag},
}

// Suites returns every suite of the product in the table's order. The caller
// owns the slice.
func Suites() []Suite { return slices.Clone(suites[:]) }

// Lookup returns the suite with the given number.
func Lookup(id SuiteID) (Suite, bool) {
	for _, s := range suites {
		if s.ID == id {
			return s, true
		}
	}
	return Suite{}, false
}

// ByName returns the suite with exactly the given name.
func ByName(name string) (Suite, bool) {
	for _, s := range suites {
		if s.Name == name {
			return s, true
		}
	}
	return Suite{}, false
}

// String returns the suite's name, or its number when it is not in the table.
func (id SuiteID) String() string {
	if s, ok := Lookup(id); ok {
		return s.Name
	}
	return fmt.Sprintf("suite(0x%04x)", uint16(id))
}

// lookupKind returns the suite if it exists and is of kind k.
func lookupKind(id SuiteID, k Kind) (Suite, error) {
	s, ok := Lookup(id)
	if !ok || s.Kind != k {
		return Suite{}, fmt.Errorf("%w: %v is not a %v suite", ErrSuite, id, k)
	}
	return s, nil
}
