package wire

import "time"

// Health answers GET /v1/health: the process runs.
type Health struct {
	Status string `json:"status"` // "ok"
	Node   string `json:"node"`
}

// Ready answers GET /v1/ready, with status 200 when Ready and 503 otherwise.
type Ready struct {
	Ready   bool     `json:"ready"`
	Reasons []string `json:"reasons,omitempty"` // why not, a sentence each
	Alarms  []string `json:"alarms,omitempty"`  // what is wrong with the audit logs, though the node may serve
}

// Status answers GET /v1/status.
type Status struct {
	Cluster string    `json:"cluster"` // cluster identifier: 32 hexadecimal digits
	Name    string    `json:"name"`    // of the cluster, from its genesis
	Node    string    `json:"node"`
	Site    string    `json:"site"`
	Version string    `json:"version,omitempty"` // of the program
	Device  string    `json:"device"`            // the hardware root in words
	Time    time.Time `json:"time"`              // this node's clock
	Clock   time.Time `json:"clock,omitzero"`    // the cluster's clock: median over sites of signed node times
	Index   uint64    `json:"index"`             // of the last applied log entry
	FreshMS int64     `json:"fresh_ms"`          // age of the last proof that this node is up to date
	LogSize uint64    `json:"log_size"`          // leaves of the cluster log
	LogRoot []byte    `json:"log_root"`          // RFC 6962 root hash of the cluster log, 32 bytes
	Epoch   uint64    `json:"epoch"`             // of the history; 0 until custodians have recovered the cluster from a backup
	Lineage string    `json:"lineage"`           // of the history: 32 hexadecimal digits, the cluster's in epoch 0
	Raft    *Raft     `json:"raft,omitempty"`
	Keys    KeyCounts `json:"keys"`
	Waiting []string  `json:"waiting,omitempty"` // kinds of commands that are not taken yet, and the nodes whose release has not announced them
	Open    int       `json:"open_proposals"`
	Pending int       `json:"pending_receipts"` // receipts that this node owes

	Staleness []Staleness `json:"staleness,omitempty"` // of the keyrings that the caller may read
}

// Staleness says whether a node may use the keys of a keyring, given how old what it
// knows of the cluster is.
type Staleness struct {
	Keyring        string `json:"keyring"`
	Resident       bool   `json:"resident"`         // this node can open it
	MaxStalenessMS int64  `json:"max_staleness_ms"` // up to this age of the state it serves everything
	Survive        bool   `json:"survive"`          // beyond that, it goes on with decrypt and verify
	Serves         string `json:"serves"`           // everything, decrypt (and verify only), nothing
}

// KeyCounts counts what is stored.
type KeyCounts struct {
	Keyrings int `json:"keyrings"`
	Resident int `json:"resident"` // keyrings that this node can open
	Keys     int `json:"keys"`
	Overdue  int `json:"overdue"` // keys whose rotation is due
}

// Raft is the consensus layer's view.
type Raft struct {
	State         string `json:"state"` // leader, follower, candidate
	Leader        string `json:"leader,omitempty"`
	Term          uint64 `json:"term"`
	Applied       uint64 `json:"applied"`
	Committed     uint64 `json:"committed"`
	LastContactMS int64  `json:"last_contact_ms"`
	QuorumMS      int64  `json:"quorum_ms"`           // since a quorum last confirmed a leader, as far as is known here; negative for never
	LeaseMS       int64  `json:"lease_ms"`            // of a leader without a quorum before it steps down
	HeartbeatMS   int64  `json:"heartbeat_ms"`        // without a word from the leader before an election
	Profile       string `json:"profile,omitempty"`   // of the timing: lan or wan; absent if it is configured
	Probation     string `json:"probation,omitempty"` // why the node serves nothing
	ReadOnly      bool   `json:"read_only"`           // its disk is nearly full: it takes no changes itself
	Peers         []Peer `json:"peers,omitempty"`

	Suspicions []Suspicion `json:"suspicions,omitempty"` // of the last hour, oldest first
}

// Suspicion is what a node has seen of others that no honest leader and no right clock would
// show. It changes nothing by itself.
type Suspicion struct {
	Kind    string    `json:"kind"`   // withheld: this node's commands do not enter the log; backdated: another's enter it late
	Leader  string    `json:"leader"` // in whose time as leader
	Term    uint64    `json:"term"`
	Origin  string    `json:"origin"` // whose commands
	First   time.Time `json:"first"`
	Last    time.Time `json:"last"`
	Count   uint64    `json:"count"`             // commands
	DelayMS int64     `json:"delay_ms"`          // the longest
	Command []byte    `json:"command,omitempty"` // SHA-256 of the latest one
	Text    string    `json:"text"`
}

// Peer is a member as the consensus layer knows it.
type Peer struct {
	ID       string `json:"id"`
	Site     string `json:"site"`
	Address  string `json:"address"`
	Suffrage string `json:"suffrage"` // voter or non-voter

	// Of another node that has answered this one.
	RTTUS   int64  `json:"rtt_us,omitempty"`   // median round trip in microseconds
	HeardMS int64  `json:"heard_ms,omitempty"` // since it last answered; negative for never
	Lag     uint64 `json:"lag"`                // log entries that it was behind then
	FreshMS int64  `json:"fresh_ms,omitempty"` // age of its own last proof that it was up to date
}

// Nodes answers GET /v1/nodes.
type Nodes struct {
	Nodes   []Node        `json:"nodes"`
	Removed []RemovedNode `json:"removed,omitempty"` // in the order of their removal
	Change  *MemberChange `json:"change,omitempty"`  // of the members, under way
}

// RemovedNode is a node that was removed; its name and its keys never come back.
type RemovedNode struct {
	ID       string    `json:"id"`
	Site     string    `json:"site"`
	Proposal string    `json:"proposal"` // that removed it
	Time     time.Time `json:"time"`
	Keyrings []string  `json:"keyrings,omitempty"` // that it could open
}

// MemberChange is a change of the members that is decided, and that the consensus layer
// does not count with yet. No other one is carried out until it does.
type MemberChange struct {
	Node     string `json:"node"`
	Proposal string `json:"proposal"`
}

// Node is a member of the cluster.
type Node struct {
	ID           string    `json:"id"`
	Site         string    `json:"site"`
	Address      string    `json:"address"` // host:port between nodes
	API          string    `json:"api"`     // https URL of its native API
	Suite        string    `json:"suite"`   // KEM suite of its agreement key
	Agreement    []byte    `json:"agreement"`
	SigningSuite string    `json:"signing_suite"`
	Signing      []byte    `json:"signing"`           // SEC1 uncompressed point
	Device       string    `json:"device"`            // what the node claims its hardware is
	Release      string    `json:"release,omitempty"` // of its program, as it has announced
	Voter        bool      `json:"voter"`
	LastHeard    time.Time `json:"last_heard,omitzero"` // latest time that the node has signed

	Root        uint32     `json:"root"`                  // number of its hardware root, 1 at the founding; 0: it joins and has yet to adopt its first
	ImportKind  string     `json:"import_kind,omitempty"` // how others wrap keys for its device
	Protections []string   `json:"protections"`           // levels that keyrings resident at it can have
	Attested    bool       `json:"attested"`              // the device was proven to be what it says, and to hold the root's keys
	Proven      []string   `json:"proven,omitempty"`      // what of the hardware was proven, a sentence each
	Claimed     []string   `json:"claimed,omitempty"`     // what the node only says
	Replacing   *Replacing `json:"replacing,omitempty"`   // the hardware root that it is to have next

	Refused []RefusedCopy `json:"refused,omitempty"` // copies that the next root refused, or the present one before it was adopted
}

// RefusedCopy is a copy of a key that did not open with a node's next hardware root,
// or held another key, as that root has signed.
type RefusedCopy struct {
	Root     uint32    `json:"root"` // number of that root
	Keyring  string    `json:"keyring"`
	Key      string    `json:"key,omitempty"` // empty for the keyring's KEK
	Version  uint32    `json:"version"`
	SealedBy string    `json:"sealed_by"` // node that sealed it; it does not again for this root
	Time     time.Time `json:"time"`
}

// Replacing is how far the replacement of a node's hardware root has come.
type Replacing struct {
	Root     uint32 `json:"root"`           // number of the next root
	Device   string `json:"device"`         // what its hardware is said to be
	Proposal string `json:"proposal"`       // that approved it
	Sealed   int    `json:"sealed"`         // copies of keys that are sealed to it
	Missing  int    `json:"missing"`        // copies that other nodes have still to seal to it
	Note     string `json:"note,omitempty"` // what hinders it
}

// Sites answers GET /v1/sites.
type Sites struct {
	Sites []Site `json:"sites"`
}

// Site is a trust domain.
type Site struct {
	ID          string   `json:"id"`
	TrustDomain string   `json:"trust_domain"`
	CAs         [][]byte `json:"cas"`   // DER certificates
	Nodes       []string `json:"nodes"` // node ids, sorted
	Revision    uint64   `json:"revision"`
}

// Custodians answers GET /v1/custodians.
type Custodians struct {
	Custodians []Custodian `json:"custodians"`
}

// Custodian is a person who approves, at one site. As a parameter of a proposal
// Revision is 0.
type Custodian struct {
	ID          string       `json:"id"`
	Site        string       `json:"site"`
	Credentials []Credential `json:"credentials"`
	Revoked     bool         `json:"revoked,omitempty"`
	Revision    uint64       `json:"revision,omitempty"`
}

// Credential is one public key of a custodian.
type Credential struct {
	ID        string `json:"id"`    // fingerprint of the public key
	Suite     uint16 `json:"suite"` // number of the signature suite
	SuiteName string `json:"suite_name,omitempty"`
	PublicKey []byte `json:"public_key"`
	Suspended bool   `json:"suspended,omitempty"` // what it signs does not count; no parameter of a proposal
}

// Policies answers GET /v1/policies.
type Policies struct {
	Policies []Policy `json:"policies"`
	Access   string   `json:"access"` // text of the Cedar policy set that authorises requests
}

// Policy is a named set of rules, at most one for an action.
type Policy struct {
	Name     string   `json:"name"`
	Revision uint64   `json:"revision"`
	Rules    []Rule   `json:"rules"`             // sorted by action
	Summary  []string `json:"summary,omitempty"` // each rule as a sentence
	Attested bool     `json:"attested"`          // keyrings under it need attested hardware at every resident node
	Forbid   []string `json:"forbid,omitempty"`  // names of suites of which nothing new is made or enrolled; of governance: by custodians, nodes, recovery keys
}

// Rule says who may let an action happen: either direct or a quorum. Field for
// field it is approval.Rule, whose comments say more.
type Rule struct {
	Action             string    `json:"action"`
	Direct             []string  `json:"direct,omitempty"`    // roles that may act alone, sorted
	Approvals          uint32    `json:"approvals,omitempty"` // distinct custodians
	Sites              uint32    `json:"sites,omitempty"`     // distinct sites among them
	Required           []string  `json:"required,omitempty"`  // sites that must be among them, sorted
	ProposerMayApprove bool      `json:"proposer_may_approve,omitempty"`
	DelayMS            int64     `json:"delay_ms,omitempty"`    // cool-off after the quorum
	LifetimeMS         int64     `json:"lifetime_ms,omitempty"` // longest life of a proposal
	Veto               []string  `json:"veto,omitempty"`        // custodians whose rejection ends it, sorted
	Need               *Group    `json:"need,omitempty"`        // a group that must be met besides
	NotBefore          time.Time `json:"not_before,omitzero"`   // nothing is carried out earlier
	UnusedMS           int64     `json:"unused_ms,omitempty"`   // deactivate, destroy: for how long a version must not have been used before
}

// Group is met when the weights of those of its members that are met add up to Need. In
// a request a weight of 0 is 1. Field for field it is approval.Group.
type Group struct {
	Need       uint32       `json:"need"`
	Weight     uint32       `json:"weight,omitempty"`     // in the group above; the outermost has none
	Custodians []Weight     `json:"custodians,omitempty"` // who approve
	Sites      []SiteWeight `json:"sites,omitempty"`      // that many custodians of which approve
	Groups     []Group      `json:"groups,omitempty"`     // that are met
}

// Weight is what a custodian's approval weighs in a group.
type Weight struct {
	Name   string `json:"name"`
	Weight uint32 `json:"weight,omitempty"`
}

// SiteWeight is what a site weighs in a group once so many of its custodians approve.
type SiteWeight struct {
	Name      string `json:"name"`
	Weight    uint32 `json:"weight,omitempty"`
	Approvals uint32 `json:"approvals"`
}
