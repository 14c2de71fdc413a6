// Package attest verifies what a node's hardware root is: documents that bind a
// node's device keys to a TPM of a known manufacturer, witnessed by a node of
// another site, or that record what a PKCS#11 token says of its keys. It tells
// apart what was proven and what is only claimed. It is pure: the state machine
// calls it on every replica.
package attest

import (
	"crypto/sha256"
	"fmt"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
)

// MaxDocument is the longest document in bytes.
const MaxDocument = 64 << 10

// Kinds of documents.
const (
	KindTPM    = "tpm2"
	KindPKCS11 = "pkcs11"
)

// Subject is the node that a document is about, with the public keys of its
// hardware root. A document holds for exactly one subject.
type Subject struct {
	Node         string `cbor:"node"`
	Site         string `cbor:"site"`
	SigningSuite uint16 `cbor:"signing-suite"` // pqc ECDSA suite of Signing
	Signing      []byte `cbor:"signing"`       // SEC1 uncompressed point
	Agreement    []byte `cbor:"agreement"`     // pqc.PublicKey bytes: ML-KEM key, then the SEC1 uncompressed point
	ImportKind   string `cbor:"import-kind"`   // empty: the device takes no imported keys
	Import       []byte `cbor:"import"`        // for a TPM the storage key, marshalled TPMT_PUBLIC
}

// Context is what a document is verified against.
type Context struct {
	Time    time.Time                         // at which certificates must be valid
	Vendors [][]byte                          // DER certificates that endorsement key certificates must lead to
	Witness func(node string) (Subject, bool) // the nodes that may witness; nil: none
}

// Report is the outcome: sentences for operators and auditors.
type Report struct {
	Kind     string // of the document; empty: there is none
	Attested bool   // the keys live in a device of a known manufacturer, as another site saw
	Proven   []string
	Claimed  []string
}

// possession holds for every node: the callers of Verify check it before.
const possession = "it holds its signing key: it signed the genesis document, or what custodians approved of it later, with it"

// Verify checks a document about a subject. Without a document the report says
// that nothing about the hardware is known. What a document asserts must hold;
// what it leaves out lowers the report. Errors: kms.TooLarge, kms.Invalid,
// kms.BadSignature.
func Verify(doc []byte, s Subject, c Context) (Report, error) {
	if len(doc) == 0 {
		return Report{Proven: []string{possession}, Claimed: []string{"everything about its hardware: it gave no attestation document"}}, nil
	}
	d, err := Parse(doc)
	if err != nil {
		return Report{}, err
	}
	r := Report{Kind: d.Kind, Proven: []string{possession}}
	if d.Kind == KindTPM {
		err = d.TPM.verify(s, c, &r)
	} else {
		err = d.PKCS11.verify(s, &r)
	}
	if err != nil {
		return Report{}, fmt.Errorf("attestation of node %s: %w", s.Node, err)
	}
	return r, nil
}

// Qualifying is what binds a device's statement to a subject: 32 bytes, SHA-256
// of the subject's canonical encoding under a label.
func Qualifying(s Subject) []byte {
	h := sha256.New()
	_, _ = h.Write([]byte("conclave/attest/subject/v1\x00"))
	_, _ = h.Write(canon.Marshal(s))
	return h.Sum(nil)
}

func (r *Report) proven(format string, a ...any) {
	r.Proven = append(r.Proven, fmt.Sprintf(format, a...))
}
func (r *Report) claimed(format string, a ...any) {
	r.Claimed = append(r.Claimed, fmt.Sprintf(format, a...))
}

func invalid(format string, a ...any) error { return kms.Errorf(kms.Invalid, format, a...) }
