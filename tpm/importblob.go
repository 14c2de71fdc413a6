package tpm

import (
	"bytes"
	"crypto"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/binary"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/kms/secret"
)

// The key blob, which TPM2_Import opens: version 2 from WrapHMAC and WrapSigner,
// version 3 from GenerateHMAC and GenerateSigner. The parts have two-byte lengths:
//
//	version byte    2 or 3
//	type byte       1 HMAC-SHA-256, 2 ECDSA P-256, 3 ECDSA P-384
//	label           version 2: 0 to 64 bytes
//	names           version 3: of the storage keys that it was made for, ascending
//	TPM2B_PUBLIC    the public area; its policy follows from label or names
//	TPM2B_PRIVATE   the duplicate: HMAC ‖ encrypted sensitive area
//	TPM2B_ENCRYPTED_SECRET  the ephemeral point that the seed comes from
//
// A type has one accepted public area per label or names, and every length is fixed.
const (
	importVersion    = 2
	generatedVersion = 3

	maxLabel    = 64
	hmacKeyLen  = 32
	labelDomain = "conclave tpm v1 label"
)

// ImportKind is the kind that ImportKey returns.
const ImportKind = "tpm2-import"

type importType byte

const (
	importHMAC importType = 1 + iota
	importP256
	importP384
)

// signerType is the type of an ECDSA key; other curves are refused.
func signerType(curve ecdh.Curve) (importType, bool) {
	switch curve {
	case ecdh.P256():
		return importP256, true
	case ecdh.P384():
		return importP384, true
	}
	return 0, false
}

// signer is the suite of an ECDSA key's curve, nil for an HMAC key.
func (t importType) signer() *suite {
	switch t {
	case importP256:
		return suiteOf(ecdh.P256())
	case importP384:
		return suiteOf(ecdh.P384())
	}
	return nil
}

// importBlob is a parsed key blob.
type importBlob struct {
	version               byte
	kind                  importType
	label                 []byte // or the names
	pub, duplicate, point []byte
}

func (b *importBlob) encode() []byte {
	out := []byte{b.version, byte(b.kind)}
	for _, part := range [][]byte{b.label, b.pub, b.duplicate, b.point} {
		out = binary.BigEndian.AppendUint16(out, uint16(len(part)))
		out = append(out, part...)
	}
	return out
}

// parseImport splits a key blob for a storage key of this suite. It accepts no
// public area, length or point but those that the Wrap and Generate functions make.
func (s *suite) parseImport(b []byte) (*importBlob, bool) {
	if len(b) < 2 || b[0] != importVersion && b[0] != generatedVersion {
		return nil, false
	}
	p := &importBlob{version: b[0], kind: importType(b[1])}
	if p.kind < importHMAC || p.kind > importP384 {
		return nil, false
	}
	rest, ok := b[2:], false
	for _, part := range []*[]byte{&p.label, &p.pub, &p.duplicate, &p.point} {
		if *part, rest, ok = sized(rest); !ok {
			return nil, false
		}
	}
	if len(rest) != 0 || !s.duplicateFits(p) {
		return nil, false
	}
	if _, ok := parsePoint(s, p.point); !ok {
		return nil, false
	}
	template, ok := s.templateOf(p)
	return p, ok && s.importedPublic(p.kind, template, p.pub)
}

// templateOf is the one template of a blob's version, type and label or names.
func (s *suite) templateOf(b *importBlob) (tpm2.TPMTPublic, bool) {
	if b.version == importVersion {
		return s.imported(b.kind, b.label), len(b.label) <= maxLabel
	}
	names, ok := s.parseNames(b.label)
	if !ok {
		return tpm2.TPMTPublic{}, false
	}
	return s.generated(b.kind, names), true
}

// importedPublic compares a public area with the template.
func (s *suite) importedPublic(kind importType, template tpm2.TPMTPublic, pub []byte) bool {
	want := tpm2.Marshal(template)
	if curve := kind.signer(); curve != nil {
		_, ok := parseECC(curve, want, pub)
		return ok
	}
	want = binary.BigEndian.AppendUint16(want[:len(want)-2], uint16(s.digest))
	return len(pub) == len(want)+s.digest && bytes.HasPrefix(pub, want)
}

// parseECC checks that pub is the marshalled template, whose last four bytes are
// the lengths of an empty point, with a full-length point of the curve.
func parseECC(curve *suite, template, pub []byte) (*ecdh.PublicKey, bool) {
	point, ok := bytes.CutPrefix(pub, template[:len(template)-4])
	if !ok {
		return nil, false
	}
	return parsePoint(curve, point)
}

// parsePoint reads a TPMS_ECC_POINT whose coordinates have the field's length.
func parsePoint(curve *suite, b []byte) (*ecdh.PublicKey, bool) {
	x, rest, ok := sized(b)
	if !ok || len(x) != curve.field {
		return nil, false
	}
	y, rest, ok := sized(rest)
	if !ok || len(y) != curve.field || len(rest) != 0 {
		return nil, false
	}
	pub, err := curve.curve.NewPublicKey(append(append([]byte{4}, x...), y...))
	return pub, err == nil
}

func eccPoint(curve *suite, pub *ecdh.PublicKey) *tpm2.TPMSECCPoint {
	raw := pub.Bytes()[1:]
	return &tpm2.TPMSECCPoint{
		X: tpm2.TPM2BECCParameter{Buffer: raw[:curve.field]}, Y: tpm2.TPM2BECCParameter{Buffer: raw[curve.field:]},
	}
}

// duplicateLen is the length of TPM2B_DIGEST ‖ TPM2B_SENSITIVE (Part 1, 23.3.2
// and Part 2, 12.3.2) without authorization value.
func (s *suite) duplicateLen(kind importType) int {
	const sizes = 2 + 2 + 2 + 2 + 2 + 2 // HMAC, sensitive area, type, authorization value, seed, key
	if curve := kind.signer(); curve != nil {
		return s.digest + sizes + curve.field
	}
	return s.digest + sizes + s.digest + hmacKeyLen
}

// duplicateFits checks the length of the duplicate. A TPM fills up the empty
// authorization value with zeros, and may give a signing key a seed; a Wrap
// function does neither.
func (s *suite) duplicateFits(b *importBlob) bool {
	more := len(b.duplicate) - s.duplicateLen(b.kind)
	if b.version == importVersion {
		return more == 0
	}
	return more == 0 || more == s.digest || more == 2*s.digest
}

func (s *suite) digestOf() crypto.Hash {
	if s.hash == tpm2.TPMAlgSHA256 {
		return crypto.SHA256
	}
	return crypto.SHA384
}

// sum hashes parts, which may be secret: the hash's own memory is overwritten
// afterwards.
func (s *suite) sum(parts ...[]byte) []byte {
	h := s.digestOf().New()
	for _, p := range parts {
		h.Write(p)
	}
	out := h.Sum(nil)
	h.Write(make([]byte, 2*h.BlockSize()))
	return out
}

// imported is the template of a key that comes from outside: it signs with one
// scheme. Its policy is a digest over the label, which no sequence of policy
// commands yields, so the label is part of the object's name and TPM2_Duplicate,
// which demands the policy, is out of reach.
func (s *suite) imported(kind importType, label []byte) tpm2.TPMTPublic {
	attr := tpm2.TPMAObject{UserWithAuth: true, NoDA: true, SignEncrypt: true}
	pub := tpm2.TPMTPublic{
		Type: tpm2.TPMAlgKeyedHash,
		Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgKeyedHash, &tpm2.TPMSKeyedHashParms{
			Scheme: tpm2.TPMTKeyedHashScheme{
				Scheme:  tpm2.TPMAlgHMAC,
				Details: tpm2.NewTPMUSchemeKeyedHash(tpm2.TPMAlgHMAC, &tpm2.TPMSSchemeHMAC{HashAlg: tpm2.TPMAlgSHA256}),
			},
		}),
		Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgKeyedHash, &tpm2.TPM2BDigest{}),
	}
	if curve := kind.signer(); curve != nil {
		pub = curve.signing()
	}
	pub.NameAlg = s.hash
	pub.ObjectAttributes = attr
	pub.AuthPolicy.Buffer = s.sum([]byte(labelDomain), []byte{0}, label)
	return pub
}

// WrapHMAC wraps a key of 32 bytes for HMAC-SHA-256 so that only the TPM whose
// ImportKey returned public can use it, as an outer duplication wrapper (TPM 2.0
// Part 1, 23.3). label, 0 to 64 bytes, stands readable in the blob and cannot be
// exchanged. Errors: ErrInvalid.
func WrapHMAC(public []byte, key *secret.Bytes, label []byte) ([]byte, error) {
	if key == nil || key.Len() != hmacKeyLen {
		return nil, invalid("an HMAC key has %d bytes", hmacKeyLen)
	}
	s, storage, err := importTarget(public, label)
	if err != nil {
		return nil, err
	}
	seed := make([]byte, s.digest) // keeps the unique field from being a check value of the key
	defer secret.Wipe(seed)
	if _, err := rand.Read(seed); err != nil {
		return nil, fmt.Errorf("tpm: wrapping an HMAC key: %w", err)
	}
	pub := s.imported(importHMAC, label)
	pub.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgKeyedHash, &tpm2.TPM2BDigest{Buffer: s.sum(seed, key.Reveal())})
	return s.duplicate(storage, importHMAC, label, pub, seed, key)
}

// WrapSigner wraps an ECDSA private key on P-256 or P-384, a big-endian scalar of
// 32 or 48 bytes, in the way of WrapHMAC. Errors: ErrInvalid.
func WrapSigner(public []byte, curve ecdh.Curve, scalar *secret.Bytes, label []byte) ([]byte, error) {
	kind, ok := signerType(curve)
	if !ok {
		return nil, invalid("a signing key is on P-256 or P-384")
	}
	s, storage, err := importTarget(public, label)
	if err != nil {
		return nil, err
	}
	on := kind.signer()
	if scalar == nil || scalar.Len() != on.field {
		return nil, invalid("a %s private key has %d bytes", on.name, on.field)
	}
	private, err := curve.NewPrivateKey(scalar.Reveal())
	if err != nil {
		return nil, invalid("the scalar is not a private key of %s", on.name)
	}
	pub := s.imported(kind, label)
	pub.Unique = tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, eccPoint(on, private.PublicKey()))
	return s.duplicate(storage, kind, label, pub, nil, scalar)
}

// importTarget reads what ImportKey returned: the public area of a storage key
// that Provision made, and no other.
func importTarget(public, label []byte) (*suite, tpm2.LabeledEncapsulationKey, error) {
	if len(label) > maxLabel {
		return nil, nil, invalid("a label has at most %d bytes", maxLabel)
	}
	for _, curve := range []ecdh.Curve{ecdh.P384(), ecdh.P256()} {
		s := suiteOf(curve)
		if _, ok := parseECC(s, tpm2.Marshal(s.storage()), public); !ok {
			continue
		}
		pub, err := tpm2.Unmarshal[tpm2.TPMTPublic](public)
		if err != nil {
			break
		}
		key, err := tpm2.ImportEncapsulationKey(pub)
		if err != nil {
			break
		}
		return s, key, nil
	}
	return nil, nil, invalid("the import key is not the public area of a storage key of this package")
}

// objectName is the name algorithm and digest of a public area (Part 1, 16).
func (s *suite) objectName(pub []byte) []byte {
	return append(binary.BigEndian.AppendUint16(nil, uint16(s.hash)), s.sum(pub)...)
}
