// Package approval is multi-party approval as pure functions: the exact bytes of
// a proposal, custodians' signed statements about it, and the arithmetic of
// quorums over distinct custodians and distinct sites.
package approval

import "github.com/conclave-kms/conclave/kms"

// Rule says who may let an action happen. It is either direct (Direct lists the
// roles that may act alone) or a quorum (Approvals and Sites at least 1); a rule
// that is neither or both is refused, never read as "no approval needed". Need comes on
// top of the thresholds and never in place of them.
type Rule struct {
	Action             kms.Action `cbor:"action" json:"action"`
	Direct             []string   `cbor:"direct" json:"direct,omitempty"`       // roles, sorted
	Approvals          uint32     `cbor:"approvals" json:"approvals,omitempty"` // M: distinct custodians
	Sites              uint32     `cbor:"sites" json:"sites,omitempty"`         // S: distinct sites among them
	Required           []string   `cbor:"required" json:"required,omitempty"`   // sites that must be among them, sorted
	ProposerMayApprove bool       `cbor:"proposer-may-approve" json:"proposer_may_approve,omitempty"`
	Delay              int64      `cbor:"delay" json:"delay_ms,omitempty"`                  // cool-off after the quorum, milliseconds
	Lifetime           int64      `cbor:"lifetime" json:"lifetime_ms,omitempty"`            // longest life of a proposal, milliseconds
	Veto               []string   `cbor:"veto" json:"veto,omitempty"`                       // custodians whose rejection ends it at once, sorted
	Need               *Group     `cbor:"need,omitempty" json:"need,omitempty"`             // of a quorum: a group that must be met besides
	NotBefore          int64      `cbor:"not-before,omitempty" json:"not_before,omitempty"` // of a quorum: nothing is carried out earlier, Unix milliseconds

	// Unused, of the actions deactivate and destroy, is for how many milliseconds a version
	// must not have been used before it happens; 0 asks for nothing.
	Unused int64 `cbor:"unused,omitempty" json:"unused_ms,omitempty"`
}

// Policy is a named, numbered set of rules, at most one for an action.
type Policy struct {
	Name     string `cbor:"name" json:"name"`
	Revision uint64 `cbor:"revision" json:"revision"`
	Rules    []Rule `cbor:"rules" json:"rules"`                 // sorted by action
	Attested bool   `cbor:"attested" json:"attested,omitempty"` // keyrings under this policy: every resident node's hardware must be attested

	// Forbid lists suites (pqc.SuiteID), sorted, of which nothing new is made or enrolled: by
	// a policy of keyrings their keys, versions and sealed copies, by kms.Governance the
	// credentials of custodians, the roots of nodes and recovery keys. What exists stays.
	Forbid []uint16 `cbor:"forbid,omitempty" json:"forbid,omitempty"`
}

// Credential is one public key of a custodian.
type Credential struct {
	ID        string `cbor:"id" json:"id"`       // pqc.Fingerprint of PublicKey
	Suite     uint16 `cbor:"suite" json:"suite"` // pqc.SuiteID
	PublicKey []byte `cbor:"public-key" json:"public_key"`
	Suspended bool   `cbor:"suspended,omitempty" json:"suspended,omitempty"` // in a record: what it signs does not count
}

// Custodian is a person who approves, at one site.
type Custodian struct {
	ID          string       `cbor:"id" json:"id"`
	Site        string       `cbor:"site" json:"site"`
	Credentials []Credential `cbor:"credentials" json:"credentials"` // sorted by ID
	Revoked     bool         `cbor:"revoked" json:"revoked,omitempty"`
	Revision    uint64       `cbor:"revision" json:"revision"`
}

// Proposal is a guarded action, exactly as custodians sign it. Its canonical
// encoding is the signed message; its identifier is derived from those bytes.
type Proposal struct {
	Format         uint8      `cbor:"format" json:"format"` // 1
	Cluster        string     `cbor:"cluster" json:"cluster"`
	Nonce          []byte     `cbor:"nonce" json:"nonce"` // 16 bytes
	Action         kms.Action `cbor:"action" json:"action"`
	Target         string     `cbor:"target" json:"target"`     // Target* forms below
	Revision       uint64     `cbor:"revision" json:"revision"` // of the target when proposed
	Policy         string     `cbor:"policy" json:"policy"`
	PolicyRevision uint64     `cbor:"policy-revision" json:"policy_revision"`
	Proposer       string     `cbor:"proposer" json:"proposer"`     // SPIFFE ID
	Created        int64      `cbor:"created" json:"created"`       // Unix milliseconds
	NotBefore      int64      `cbor:"not-before" json:"not_before"` // Unix milliseconds
	Expires        int64      `cbor:"expires" json:"expires"`       // Unix milliseconds
	Reason         string     `cbor:"reason" json:"reason"`         // 1 to 1000 bytes
	Parameters     []byte     `cbor:"parameters" json:"parameters"` // canonical encoding of the action's *Params type, empty where there is none
}

// Targets are "key/KEYRING/KEY", "keyring/NAME", "policy/NAME", "custodian/ID", "node/ID", "site/ID",
// "recovery/NAME".

// VersionParams are the parameters of activate, deactivate, compromise and destroy.
type VersionParams struct {
	Override bool   `cbor:"override,omitempty" json:"override,omitempty"` // of deactivate and destroy: although it may be in use, see Rule.Unused
	Version  uint32 `cbor:"version" json:"version"`                       // 0: the whole key (destroy only)
}

// ScheduleParams are the parameters of the action schedule.
type ScheduleParams struct {
	RotationPeriod int64 `cbor:"rotation-period" json:"rotation_period_ms"` // milliseconds; 0: the key is rotated on request only
}

// PolicyParams are the parameters of the action policy: what replaces the content of the
// target policy.
type PolicyParams struct {
	Rules    []Rule   `cbor:"rules" json:"rules"`
	Attested bool     `cbor:"attested" json:"attested,omitempty"`
	Forbid   []uint16 `cbor:"forbid,omitempty" json:"forbid,omitempty"`
}

// CustodianParams are the parameters of the action custodian: the record that
// replaces the target custodian's (Revision is ignored and must be 0).
type CustodianParams struct {
	Custodian  Custodian    `cbor:"custodian" json:"custodian"`
	Possession []Possession `cbor:"possession,omitempty" json:"possession,omitempty"` // of new credentials, sorted
	Restore    []string     `cbor:"restore,omitempty" json:"restore,omitempty"`       // suspended credentials that count again, sorted; nothing else changes
}

// NodeRoot is a hardware root that is to replace a node's present one: the fields
// of the node's record that change with it. It is the parameters of the action
// node, as NodeParams.
type NodeRoot struct {
	Suite        uint16 `cbor:"suite" json:"suite"`
	Agreement    []byte `cbor:"agreement" json:"agreement"`
	SigningSuite uint16 `cbor:"signing-suite" json:"signing_suite"`
	Signing      []byte `cbor:"signing" json:"signing"`
	Device       string `cbor:"device" json:"device"`
	ImportKind   string `cbor:"import-kind" json:"import_kind,omitempty"`
	Import       []byte `cbor:"import" json:"import,omitempty"`
	Attestation  []byte `cbor:"attestation" json:"attestation,omitempty"`
}

// NodeChange is what the action node does with its target.
type NodeChange string

// The changes.
const (
	NodeReplaceRoot NodeChange = "root"    // give a member another hardware root
	NodeJoin        NodeChange = "join"    // make a new member that does not vote
	NodePromote     NodeChange = "promote" // let a member vote
	NodeRemove      NodeChange = "remove"  // end a membership for good
)

// NodeParams are the parameters of the action node. Fields that a change does not
// have are empty.
type NodeParams struct {
	Change NodeChange `cbor:"change" json:"change"`
	// Site, Address (host:port between nodes) and API (https URL) are a new member's.
	Site    string `cbor:"site" json:"site,omitempty"`
	Address string `cbor:"address" json:"address,omitempty"`
	API     string `cbor:"api" json:"api,omitempty"`
	// Root is the hardware root to come, for the changes root and join.
	Root NodeRoot `cbor:"root" json:"root"`
	// Possession is the new signing key's signature over RootMessage, so that
	// nobody proposes a key that is not theirs.
	Possession []byte `cbor:"possession" json:"possession,omitempty"`
	// Leave, for the changes root and join, lets the node adopt the root although key
	// versions of protection hardware, or KEKs of keyrings at this node alone, could
	// not be moved to it; it cannot use those any more. For the change remove it lets the
	// last node go that can open a keyring, whose keys are lost with it.
	Leave bool `cbor:"leave" json:"leave,omitempty"`
}

// SiteChange is what the action site does with its target.
type SiteChange string

// The changes.
const (
	SiteAdd    SiteChange = "add"    // make a new site
	SiteCAs    SiteChange = "cas"    // replace the bundle of CAs
	SiteRemove SiteChange = "remove" // end a site for good
)

// SiteParams are the parameters of the action site. Fields that a change does not
// have are empty.
type SiteParams struct {
	Change      SiteChange `cbor:"change" json:"change"`
	TrustDomain string     `cbor:"trust-domain" json:"trust_domain,omitempty"` // of a new site
	CAs         [][]byte   `cbor:"cas" json:"cas,omitempty"`                   // DER certificates that may speak for the trust domain
}

// Verdict is a custodian's answer.
type Verdict string

// The verdicts.
const (
	Approve Verdict = "approve"
	Reject  Verdict = "reject"
)

// Statement is a custodian's signed verdict on a proposal. The signature is by
// the credential over Message(verdict, proposal bytes) in the context Context.
type Statement struct {
	Proposal   string  `cbor:"proposal" json:"proposal"` // proposal identifier
	Verdict    Verdict `cbor:"verdict" json:"verdict"`
	Custodian  string  `cbor:"custodian" json:"custodian"`
	Credential string  `cbor:"credential" json:"credential"`
	Signature  []byte  `cbor:"signature" json:"signature"`
}

// Context is the signature context (pqc.Verify) of custodians' statements.
const Context = "conclave/approval/v1"
