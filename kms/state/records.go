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
	Root         uint32 `cbor:"root"`          // number of this hardware root, 1 in the genesis
	ImportKind   string `cbor:"import-kind"`   // how others wrap a key for the device; empty: it cannot have protection hardware
	Import       []byte `cbor:"import"`        // what they need for it
	Attestation  []byte `cbor:"attestation"`   // document of package attest; empty: none
	Voter        bool   `cbor:"voter"`
	Revision     uint64 `cbor:"revision"` // 1 in the genesis
}

// Replacement is the hardware root that a node is to have next, approved by the
// custodians. It becomes the node's own with AdoptRoot.
type Replacement struct {
	Node     string            `cbor:"node"`
	Root     uint32            `cbor:"root"` // its number: one more than the present root's, or than that of the replacement that this one took the place of
	New      approval.NodeRoot `cbor:"new"`
	Leave    bool              `cbor:"leave"` // approval.NodeParams.Leave
	Proposal string            `cbor:"proposal"`
	Time     int64             `cbor:"time"`  // cluster clock when it was approved
	Index    uint64            `cbor:"index"` // of the execution in the log
}

// FormerRoot is a hardware root that a node had before: what it signed until then
// still verifies.
type FormerRoot struct {
	Node         string `cbor:"node"`
	Root         uint32 `cbor:"root"`
	SigningSuite uint16 `cbor:"signing-suite"`
	Signing      []byte `cbor:"signing"`
	Proposal     string `cbor:"proposal"`  // that approved the root after it
	Time         int64  `cbor:"time"`      // cluster clock when the root after it was adopted
	Until        uint64 `cbor:"until"`     // index of Statement in the log: from there on it signs nothing
	Statement    []byte `cbor:"statement"` // the AdoptRoot that ended it
}

// NodeStatus is the latest time that a node has signed in a Tick, Unix
// milliseconds.
type NodeStatus struct {
	Node      string `cbor:"node"`
	Time      int64  `cbor:"time"`
	Statement []byte `cbor:"statement"` // that tick, empty before the first one
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
	KEK          uint32         `cbor:"kek"` // primary KEK version; it changes without the revision
	Created      int64          `cbor:"created"`
	Creator      string         `cbor:"creator"` // SPIFFE ID
	Revision     uint64         `cbor:"revision"`
	Index        uint64         `cbor:"index"` // of Statement in the log
	Statement    []byte         `cbor:"statement"`
}

// SealedCopy is a KEK version, or a key version of protection hardware wrapped for
// the node's device, sealed to one node (pqc.PublicKey.Seal).
type SealedCopy struct {
	Node   string `cbor:"node"`
	Root   uint32 `cbor:"root"` // number of the node's root that opens it
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
	Time      int64  `cbor:"time"`      // cluster clock
	Index     uint64 `cbor:"index"`     // of Statement in the log
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

	Proposal     string `cbor:"proposal,omitempty"`      // that authorised it, empty for version 1
	Index        uint64 `cbor:"index,omitempty"`         // of the command that brought it in the log, 0 for version 1
	Activated    int64  `cbor:"activated,omitempty"`     // when it became primary, 0 for version 1
	RetiredAt    int64  `cbor:"retired-at,omitempty"`    // cluster clock; it has no copies any more
	RetiredIndex uint64 `cbor:"retired-index,omitempty"` // of Retirement in the log
	Retirement   []byte `cbor:"retirement,omitempty"`    // the RetireKEK
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
	Index          uint64        `cbor:"index"`     // of the command that made it in the log
	Statement      []byte        `cbor:"statement"` // that command, empty once version 1 is destroyed
}

// Version is a key version. When destroyed it stays as a tombstone without
// Wrapped.
type Version struct {
	Keyring   string        `cbor:"keyring"`
	Key       string        `cbor:"key"`
	Version   uint32        `cbor:"version"`
	State     kms.State     `cbor:"state"`
	KEK       uint32        `cbor:"kek"`        // KEK version that wraps it
	Wrapped   []byte        `cbor:"wrapped"`    // material under the KEK
	PublicKey []byte        `cbor:"public-key"` // SEC1 point or Ed25519 key for sign keys, else empty
	Copies    []SealedCopy  `cbor:"copies"`     // in place of KEK and Wrapped where the keyring's protection is hardware
	Generated kms.Generated `cbor:"generated"`  // of protection hardware
	Checks    []Check       `cbor:"checks"`     // empty for version 1 of protection software and for sign keys of protection hardware
	Receipts  []Receipt     `cbor:"receipts"`   // sorted by node
	Proposal  string        `cbor:"proposal"`   // that authorised it, empty for version 1
	Created   int64         `cbor:"created"`
	Activated int64         `cbor:"activated"`
	Index     uint64        `cbor:"index"`     // of the command that brought it in the log
	Statement []byte        `cbor:"statement"` // that command, empty once destroyed
	Origin    string        `cbor:"origin"`    // node that sent it
	Erased    []byte        `cbor:"erased"`    // once destroyed: SHA-256 of that command, as in its log leaf

	Made uint32     `cbor:"made,omitempty"` // KEK version that wrapped it first, where KEK is a later one
	Next *Rewrapped `cbor:"next,omitempty"` // as a batch brought it; not in use before all resident nodes have confirmed
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
	Time      int64              `cbor:"time"`  // cluster clock
	Index     uint64             `cbor:"index"` // in the log
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
	Executed     uint64            `cbor:"executed"`      // index of Execution in the log, 0 until then
	Execution    []byte            `cbor:"execution"`     // the signed command that carried it out; empty once the version that it brought is destroyed
	Opened       int64             `cbor:"opened"`        // cluster clock
	Index        uint64            `cbor:"index"`         // of Statement in the log
	Statement    []byte            `cbor:"statement"`     // the signed command that opened it
}

// Outcome is what became of a command with an idempotency key.
type Outcome struct {
	Key       []byte   `cbor:"key"`       // the idempotency key, 32 bytes
	Principal string   `cbor:"principal"` // on whose behalf
	Request   []byte   `cbor:"request"`   // 32-byte hash of the request
	Index     uint64   `cbor:"index"`     // in the log
	Time      int64    `cbor:"time"`      // cluster clock
	Kind      kms.Kind `cbor:"kind"`      // 0: applied
}

// Result returns the outcome as the result of a repeated command. The words of a
// refusal are not part of the state, so that a release may mend them.
func (o Outcome) Result() Result {
	r := Result{Index: o.Index, Kind: o.Kind, Duplicate: true}
	if o.Kind != 0 {
		r.Message = "the same request was refused before (" + o.Kind.String() + "); mend it and use a new idempotency key"
	}
	return r
}

// Pending is a version whose receipt by a node, or copy for a node's next root, is
// missing: of a key, or of the keyring's KEK where Key is empty.
type Pending struct {
	Keyring string
	Key     string
	Version uint32
}

// resealed is the statement behind a copy that came with a Reseal. It goes with the
// copy: when the root that opens it is replaced, or the version is destroyed.
type resealed struct {
	Node      string `cbor:"node"`
	Root      uint32 `cbor:"root"`
	Keyring   string `cbor:"keyring"`
	Key       string `cbor:"key"` // empty for the KEK
	Version   uint32 `cbor:"version"`
	Origin    string `cbor:"origin"` // node that resealed
	Time      int64  `cbor:"time"`   // cluster clock
	Index     uint64 `cbor:"index"`  // of Statement in the log
	Statement []byte `cbor:"statement"`
}

// RefusedCopy is a copy for a node's next root that the root refused. It stays until
// the node has another root, so that its operator sees who sealed it.
type RefusedCopy struct {
	Node      string `cbor:"node"`
	Root      uint32 `cbor:"root"` // number of the root that refused it
	Keyring   string `cbor:"keyring"`
	Key       string `cbor:"key"` // empty for the KEK
	Version   uint32 `cbor:"version"`
	By        string `cbor:"by"`    // node that resealed; it does not again for this root
	Copy      []byte `cbor:"copy"`  // SHA-256 of the sealed copy
	Time      int64  `cbor:"time"`  // cluster clock
	Index     uint64 `cbor:"index"` // of Statement in the log
	Statement []byte `cbor:"statement"`
}

// nonce is a nonce seen in a verified command.
type nonce struct {
	Origin string `cbor:"origin"`
	Nonce  []byte `cbor:"nonce"`
	Time   int64  `cbor:"time"` // of the envelope
}
