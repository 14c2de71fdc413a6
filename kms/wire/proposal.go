package wire

import "time"

// Proposals answers GET /v1/proposals: a page, newest first.
type Proposals struct {
	Proposals []Proposal `json:"proposals"`
	Next      uint64     `json:"next,omitempty"` // there are more: ask again with this as before
}

// MaxProposals is how many proposals a page has at most.
const MaxProposals = 100

// ProposalQuery selects proposals: the query of GET /v1/proposals. What is not set
// selects all.
type ProposalQuery struct {
	Open     bool   // open: only those that can still be carried out
	Action   string // action
	Target   string // target
	WaitsFor string // waits_for: a custodian's id; those open ones that it has not voted on and whose approval would count
	Before   uint64 // before: Next of the page before
	Limit    int    // limit: of the page, at most and by default MaxProposals
}

// OpenProposalRequest is the body of POST /v1/proposals. The node adds the
// present revisions of target and policy, the proposer and the times.
type OpenProposalRequest struct {
	Action      string             `json:"action"` // rotate, activate, suspend, resume, deactivate, compromise, destroy, import, schedule, policy, custodian, node, site, recovery-key
	Target      string             `json:"target"` // key/KEYRING/KEY, keyring/NAME (to rotate its KEK), policy/NAME, custodian/ID, node/ID, site/ID or recovery/NAME
	Parameters  ProposalParameters `json:"parameters,omitzero"`
	Reason      string             `json:"reason"`                  // 1 to MaxReason bytes
	ExpiresInMS int64              `json:"expires_in_ms,omitempty"` // default and most: the rule's lifetime
	NotBefore   time.Time          `json:"not_before,omitzero"`     // default: at once
}

// ProposalParameters are the parameters of an action; only those that the
// action has may be set.
type ProposalParameters struct {
	Version          uint32     `json:"version,omitempty"`            // activate, deactivate, compromise, destroy (0: the whole key)
	Override         bool       `json:"override,omitempty"`           // deactivate, destroy: although it may be in use
	RotationPeriodMS *int64     `json:"rotation_period_ms,omitempty"` // schedule: 0 for on request only
	Rules            []Rule     `json:"rules,omitempty"`              // policy
	Attested         *bool      `json:"attested,omitempty"`           // policy: need attested hardware; when it is opened the default is what the policy says now
	Forbid           []string   `json:"forbid,omitzero"`              // policy: names of suites of which nothing new is made; when it is opened the default is what the policy says now, [] forbids none
	Custodian        *Custodian `json:"custodian,omitempty"`          // custodian

	Possession []Possession `json:"possession,omitempty"` // custodian: of each credential that is new
	Restore    []string     `json:"restore,omitempty"`    // custodian: suspended credentials that are to count again; nothing else changes then

	Node     *NextRoot `json:"node,omitempty"`     // node
	Site     *NextSite `json:"site,omitempty"`     // site
	Recovery []byte    `json:"recovery,omitempty"` // recovery-key: approval.RecoveryParams in canonical CBOR

	Import *ImportedKey `json:"import,omitempty"` // import
}

// ImportedKey is a key that is to be made of material which is sealed to a node: field
// for field it is approval.ImportParams.
type ImportedKey struct {
	Node             string `json:"node"` // resident node to which the material is sealed
	Purpose          string `json:"purpose"`
	Algorithm        string `json:"algorithm"`
	RotationPeriodMS int64  `json:"rotation_period_ms,omitempty"`
	PublicKey        []byte `json:"public_key,omitempty"` // sign keys: SEC1 uncompressed point or Ed25519 key
	Sealed           []byte `json:"sealed"`               // SHA-256 of the sealed material
}

// NextRoot is what becomes of a node: field for field it is approval.NodeParams.
type NextRoot struct {
	Change     string   `json:"change,omitempty"`     // root (default), join, promote, remove
	Site       string   `json:"site,omitempty"`       // join: the node's site
	Address    string   `json:"address,omitempty"`    // join: host:port between nodes
	API        string   `json:"api,omitempty"`        // join: https URL of its native API
	Root       NodeRoot `json:"root,omitzero"`        // root, join: the hardware root to come
	Possession []byte   `json:"possession,omitempty"` // signature by the root's signing key that it is to be this node's root
	Leave      bool     `json:"leave,omitempty"`      // root, join: adopt it although keys of protection hardware could not be moved to it; remove: lose what no other node can open
}

// NextSite is what becomes of a site: field for field it is approval.SiteParams.
type NextSite struct {
	Change      string   `json:"change"`                 // add, cas, remove
	TrustDomain string   `json:"trust_domain,omitempty"` // add
	CAs         [][]byte `json:"cas,omitempty"`          // add, cas: DER certificates
}

// NodeRoot is the public half of a hardware root. Field for field it is
// approval.NodeRoot, with the names of the suites.
type NodeRoot struct {
	Suite            uint16 `json:"suite"` // number of the KEM suite
	SuiteName        string `json:"suite_name,omitempty"`
	Agreement        []byte `json:"agreement"`
	SigningSuite     uint16 `json:"signing_suite"`
	SigningSuiteName string `json:"signing_suite_name,omitempty"`
	Signing          []byte `json:"signing"` // SEC1 uncompressed point
	Device           string `json:"device"`
	ImportKind       string `json:"import_kind,omitempty"`
	Import           []byte `json:"import,omitempty"`
	Attestation      []byte `json:"attestation,omitempty"`
}

// Proposal is a proposal and where it stands.
type Proposal struct {
	ID      string          `json:"id"`    // 32 hexadecimal digits, derived from Bytes
	Bytes   []byte          `json:"bytes"` // exactly what custodians sign
	Content ProposalContent `json:"content"`

	Progress     string    `json:"progress"` // open, waiting, authorised, executed, rejected, void, expired
	Summary      string    `json:"summary"`  // where it stands, a sentence
	Met          bool      `json:"met"`      // the quorum is reached
	Approvals    int       `json:"approvals"`
	Sites        int       `json:"sites"`             // distinct sites among the approvals
	Missing      []string  `json:"missing,omitempty"` // what the quorum lacks, a sentence each
	Rule         *Rule     `json:"rule,omitempty"`    // in force now for its action
	Votes        []Vote    `json:"votes"`
	AuthorisedAt time.Time `json:"authorised_at,omitzero"`
	ExecutableAt time.Time `json:"executable_at,omitzero"` // AuthorisedAt and delay, or not-before
	ClosedAt     time.Time `json:"closed_at,omitzero"`
}

// ProposalContent is the content decoded from Proposal.Bytes, field for field.
type ProposalContent struct {
	Format         uint8              `json:"format"`
	Cluster        string             `json:"cluster"`
	Nonce          []byte             `json:"nonce"`
	Action         string             `json:"action"`
	Target         string             `json:"target"`
	Revision       uint64             `json:"revision"` // of the target when proposed
	Policy         string             `json:"policy"`
	PolicyRevision uint64             `json:"policy_revision"`
	Proposer       string             `json:"proposer"` // SPIFFE ID
	Created        time.Time          `json:"created"`
	NotBefore      time.Time          `json:"not_before,omitzero"`
	Expires        time.Time          `json:"expires"`
	Reason         string             `json:"reason"`
	Parameters     ProposalParameters `json:"parameters,omitzero"`
}

// Vote is a custodian's statement as recorded.
type Vote struct {
	Site      string    `json:"site"`
	Time      time.Time `json:"time"`
	Statement Statement `json:"statement"`
}

// Statement is a custodian's signed verdict (approval.Statement): the signature
// by Credential over approval.Message(verdict, proposal bytes).
type Statement struct {
	Proposal   string `json:"proposal"` // proposal id
	Verdict    string `json:"verdict"`  // approve or reject
	Custodian  string `json:"custodian"`
	Credential string `json:"credential"` // credential id
	Signature  []byte `json:"signature"`
}

// VoteRequest is the body of POST /v1/proposals/{id}/votes.
type VoteRequest struct {
	Statement Statement `json:"statement"`
}
