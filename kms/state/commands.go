package state

import (
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

// Type numbers a kind of command. Numbers are part of the log: append only.
type Type uint16

// The command types.
const (
	TypeTick           Type = 1
	TypeCreateKeyring  Type = 2
	TypeCreateKey      Type = 3
	TypeOpenProposal   Type = 4
	TypeVote           Type = 5
	TypeExecute        Type = 6
	TypeCommitRotation Type = 7
	TypeReceipt        Type = 8
	TypeReseal         Type = 9
	TypeAdoptRoot      Type = 10
	TypeRefuseCopy     Type = 11
	TypeConfirmMembers Type = 12
	TypeCommitKEK      Type = 15
	TypeRewrap         Type = 16
	TypeConfirmRewrap  Type = 17
	TypeRefuseRewrap   Type = 18
	TypeRetireKEK      Type = 19
	TypeAnnounce       Type = 23
	TypeSealRecovery   Type = 25
	TypeRestoreCopy    Type = 26
)

// Command is the payload of an envelope.
type Command interface{ Type() Type }

// Tick moves the cluster's clock: every node sends one every few seconds. The
// clock is the median over sites of the latest time that a node of the site
// has signed, so one site alone can neither stop nor push it.
type Tick struct{}

// CreateKeyring makes a keyring with KEK version 1.
type CreateKeyring struct {
	Name         string         `cbor:"name"`
	Residency    []string       `cbor:"residency"` // sites, sorted
	Protection   kms.Protection `cbor:"protection"`
	Policy       string         `cbor:"policy"`
	Receipts     kms.Receipts   `cbor:"receipts"`
	MaxStaleness int64          `cbor:"max-staleness"`
	Survive      bool           `cbor:"survive"`
	Copies       []SealedCopy   `cbor:"copies"` // one for every node of the residency, sorted
	Checks       []Check        `cbor:"checks"` // the same nodes
}

// CreateKey makes a key with version 1, active at once.
type CreateKey struct {
	Keyring        string        `cbor:"keyring"`
	Name           string        `cbor:"name"`
	ID             []byte        `cbor:"id"`
	Purpose        kms.Purpose   `cbor:"purpose"`
	Algorithm      kms.Algorithm `cbor:"algorithm"`
	RotationPeriod int64         `cbor:"rotation-period"`
	KEK            uint32        `cbor:"kek"`     // 0 for protection hardware
	Wrapped        []byte        `cbor:"wrapped"` // empty for protection hardware
	Copies         []SealedCopy  `cbor:"copies"`  // protection hardware: one for every resident node, sorted
	Generated      kms.Generated `cbor:"generated"`
	PublicKey      []byte        `cbor:"public-key"`
	Checks         []Check       `cbor:"checks"` // protection hardware but for sign keys: one for every resident node, sorted
}

// OpenProposal opens a proposal given as its exact bytes.
type OpenProposal struct {
	Proposal []byte `cbor:"proposal"`
}

// CastVote records a custodian's approval or rejection.
type CastVote struct {
	Statement approval.Statement `cbor:"statement"`
}

// Execute carries out an authorised proposal of any action but rotate.
type Execute struct {
	Proposal string `cbor:"proposal"`
}

// CommitRotation brings the new version that an authorised proposal asked for.
// The first one wins.
type CommitRotation struct {
	Proposal  string        `cbor:"proposal"`
	Keyring   string        `cbor:"keyring"`
	Key       string        `cbor:"key"`
	Version   uint32        `cbor:"version"`
	KEK       uint32        `cbor:"kek"`
	Wrapped   []byte        `cbor:"wrapped"`
	Copies    []SealedCopy  `cbor:"copies"` // as in CreateKey
	Generated kms.Generated `cbor:"generated"`
	PublicKey []byte        `cbor:"public-key"`
	Checks    []Check       `cbor:"checks"` // one for every resident node, sorted; none for a sign key of protection hardware
}

// GiveReceipt proves that the origin node can open a version: of the key, or of
// the keyring's KEK where Key is empty.
type GiveReceipt struct {
	Keyring string `cbor:"keyring"`
	Key     string `cbor:"key"`
	Version uint32 `cbor:"version"`
	KCV     []byte `cbor:"kcv"` // for a sign key of protection hardware: its signature r‖s of kms.ReceiptMessage
}

// Reseal gives a node whose root is being replaced a copy for its next root: of a
// KEK version, or of a key version of protection hardware where Key is not empty.
// Another resident node sends it, none twice for a version whose copy the next root
// has refused.
type Reseal struct {
	Node    string `cbor:"node"`
	Root    uint32 `cbor:"root"` // number of the next root
	Keyring string `cbor:"keyring"`
	Key     string `cbor:"key"`
	Version uint32 `cbor:"version"`
	Sealed  []byte `cbor:"sealed"`
}

// AdoptRoot makes the next root of the origin node its own. The envelope is
// signed with the new signing key.
type AdoptRoot struct {
	Root   uint32 `cbor:"root"`
	Copies []byte `cbor:"copies"` // AdoptionDigest of the copies that the node has opened and checked
}

// RefuseCopy says that a copy for the next root of the origin node does not open
// with it, or holds another key. The envelope is signed with the new signing key.
// The copy goes, and another resident node than By reseals.
type RefuseCopy struct {
	Root    uint32 `cbor:"root"`
	Keyring string `cbor:"keyring"`
	Key     string `cbor:"key"` // empty for the KEK
	Version uint32 `cbor:"version"`
	By      string `cbor:"by"`   // node that resealed
	Copy    []byte `cbor:"copy"` // SHA-256 of the sealed copy
}

// Type implements Command.
func (Tick) Type() Type           { return TypeTick }
func (CreateKeyring) Type() Type  { return TypeCreateKeyring }
func (CreateKey) Type() Type      { return TypeCreateKey }
func (OpenProposal) Type() Type   { return TypeOpenProposal }
func (CastVote) Type() Type       { return TypeVote }
func (Execute) Type() Type        { return TypeExecute }
func (CommitRotation) Type() Type { return TypeCommitRotation }
func (GiveReceipt) Type() Type    { return TypeReceipt }
func (Reseal) Type() Type         { return TypeReseal }
func (AdoptRoot) Type() Type      { return TypeAdoptRoot }
func (RefuseCopy) Type() Type     { return TypeRefuseCopy }
func (ConfirmMembers) Type() Type { return TypeConfirmMembers }
func (Announce) Type() Type       { return TypeAnnounce }
