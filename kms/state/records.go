package state

import (
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

// The records of the state. They are immutable once stored: whoever reads one
// must not write to it. Statement fields hold the signed commands (as received)
// that made the record, so that evidence and a restored snapshot can be verified.

// Site is a trust domain.
type Site struct {
	ID          string   `cbor:"id"`
	TrustDomain string   `cbor:"trust-domain"`
	CAs         [][]byte `cbor:"cas"` // DER certificates that may speak for the trust domain
}

// Node is a member of the cluster with its hardware root's public half.
type Node struct {
	ID           string `cbor:"id"`
	Site         string `cbor:"site"`
	Address      string `cbor:"address"`       // host:port between nodes
	API          string `cbor:"api"`           // https URL of the native API
	Suite        uint16 `cbor:"suite"`         // pqc KEM suite of Agreement
	Agreement    []byte `cbor:"agreement"`     // pqc.PublicKey bytes (ML-KEM ‖ EC point)
	SigningSuite uint16 `cbor:"signing-suite"` // pqc ECDSA suite of Signing
	Signing      []byte `cbor:"signing"`       // SEC1 uncompressed point
	Device       string `cbor:"device"`        // what the node claims its hardware is
	Voter        bool   `cbor:"voter"`
}

// NodeStatus is what a node last said of itself, Unix milliseconds.
type NodeStatus struct {
	Node string `cbor:"node"`
	Time int64  `cbor:"time"`
}

// Keyring is a set of keys with one residency, protection level and policy.
type Keyring struct {
	Name         string         `cbor:"name"`
	Residency    []string       `cbor:"residency"` // sites, sorted
	Protection   kms.Protection `cbor:"protection"`
	Policy       string         `cbor:"policy"`
	Receipts     kms.Receipts   `cbor:"receipts"`
	MaxStaleness int64          `cbor:"max-staleness"` // milliseconds
	Survive      bool           `cbor:"survive"`
	KEK          uint32         `cbor:"kek"` // primary KEK version
	Created      int64          `cbor:"created"`
	Creator      string         `cbor:"creator"` // SPIFFE ID
	Revision     uint64         `cbor:"revision"`
	Statement    []byte         `cbor:"statement"`
}

// SealedCopy is a KEK version sealed to one node (pqc.PublicKey.Seal).
type SealedCopy struct {
	Node   string `cbor:"node"`
	Sealed []byte `cbor:"sealed"`
}

// Check commits to what a node must show in its receipt: SHA-256 of the key
// check value bound to that node.
type Check struct {
	Node string `cbor:"node"`
	Hash []byte `cbor:"hash"` // 32 bytes
}

// Receipt is a node's proof that it can open a version.
type Receipt struct {
	Node      string `cbor:"node"`
	KCV       []byte `cbor:"kcv"`       // 32 bytes, hashes to the node's Check
	Statement []byte `cbor:"statement"` // the signed receipt command
}

// KEK is a version of a keyring's key-encryption key.
type KEK struct {
	Keyring  string       `cbor:"keyring"`
	Version  uint32       `cbor:"version"`
	Copies   []SealedCopy `cbor:"copies"` // sorted by node
	Checks   []Check      `cbor:"checks"` // sorted by node, one per copy
	Receipts []Receipt    `cbor:"receipts"`
	Created  int64        `cbor:"created"`
}

// Key is a named thing with one purpose and numbered versions.
type Key struct {
	Keyring        string        `cbor:"keyring"`
	Name           string        `cbor:"name"`
	ID             []byte        `cbor:"id"` // kms.KeyID
	Purpose        kms.Purpose   `cbor:"purpose"`
	Algorithm      kms.Algorithm `cbor:"algorithm"`
	Suspended      bool          `cbor:"suspended"`
	Primary        uint32        `cbor:"primary"`         // version that new operations use, 0 when none is left
	Latest         uint32        `cbor:"latest"`          // highest version number ever given
	RotationPeriod int64         `cbor:"rotation-period"` // milliseconds, 0: rotated on request only
	Created        int64         `cbor:"created"`
	Rotated        int64         `cbor:"rotated"` // when Primary became primary
	Creator        string        `cbor:"creator"`
	Revision       uint64        `cbor:"revision"`
	Statement      []byte        `cbor:"statement"`
}

// Version is a key version. When destroyed it stays as a tombstone without
// Wrapped.
type Version struct {
	Keyring   string    `cbor:"keyring"`
	Key       string    `cbor:"key"`
	Version   uint32    `cbor:"version"`
	State     kms.State `cbor:"state"`
	KEK       uint32    `cbor:"kek"`        // KEK version that wraps it
	Wrapped   []byte    `cbor:"wrapped"`    // material under the KEK
	PublicKey []byte    `cbor:"public-key"` // SEC1 point or Ed25519 key for sign keys, else empty
	Checks    []Check   `cbor:"checks"`     // empty for version 1
	Receipts  []Receipt `cbor:"receipts"`   // sorted by node
	Proposal  string    `cbor:"proposal"`   // that authorised it, empty for version 1
	Created   int64     `cbor:"created"`
	Activated int64     `cbor:"activated"`
	Statement []byte    `cbor:"statement"` // the command that brought it
}

// Progress is where a proposal stands.
type Progress string

// The stages of a proposal. Expiry is not a stage: it follows from the clock.
const (
	Open       Progress = "open"
	Authorised Progress = "authorised" // quorum reached (the delay may still run)
	Executed   Progress = "executed"
	Rejected   Progress = "rejected"
	Void       Progress = "void" // the target or the policy changed meanwhile
)

// Vote is a custodian's statement as recorded.
type Vote struct {
	Site      string             `cbor:"site"`
	Time      int64              `cbor:"time"`
	Statement approval.Statement `cbor:"statement"`
}

// Proposal is a proposal with everything said about it.
type Proposal struct {
	ID           string            `cbor:"id"`
	Bytes        []byte            `cbor:"bytes"` // as signed
	Content      approval.Proposal `cbor:"content"`
	Progress     Progress          `cbor:"progress"`
	Votes        []Vote            `cbor:"votes"`         // in order of arrival, one a custodian
	AuthorisedAt int64             `cbor:"authorised-at"` // 0 until then
	ClosedAt     int64             `cbor:"closed-at"`     // executed, rejected or void
	Execution    []byte            `cbor:"execution"`     // the signed command that carried it out
	Statement    []byte            `cbor:"statement"`     // the signed command that opened it
}
