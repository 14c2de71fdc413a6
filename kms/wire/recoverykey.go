package wire

import "time"

// RecoveryKeys answers GET /v1/recovery-keys.
type RecoveryKeys struct {
	Keys []RecoveryKey `json:"keys"`
}

// RecoveryKey is a key to which the KEKs of a residency are sealed besides the nodes.
type RecoveryKey struct {
	Name      string           `json:"name"`
	Number    uint64           `json:"number"` // the highest of a name is in use
	Residency []string         `json:"residency"`
	Threshold uint32           `json:"threshold"` // shares that it takes
	Sites     uint32           `json:"sites"`     // sites among them that it takes
	Holders   []RecoveryHolder `json:"holders"`
	Params    []byte           `json:"params"` // approval.RecoveryParams in canonical CBOR
	Proposal  string           `json:"proposal"`
	Time      time.Time        `json:"time"`
	KEKs      []RecoverableKEK `json:"keks"`
	Roots     []RecoveryRoot   `json:"roots"` // next hardware roots at the sites of the residency
}

// RecoveryHolder is a custodian with a share.
type RecoveryHolder struct {
	Custodian string `json:"custodian"`
	Site      string `json:"site"`
}

// RecoverableKEK is a KEK version with its copies for the recovery key.
type RecoverableKEK struct {
	Keyring string      `json:"keyring"`
	Version uint32      `json:"version"`
	Copies  []SiteCopy  `json:"copies"`
	Checks  []NodeCheck `json:"checks"` // commitments to check values
}

// SiteCopy is the copy that a site has given.
type SiteCopy struct {
	Site   string `json:"site"`
	Node   string `json:"node"` // that sealed it
	Sealed []byte `json:"sealed"`
}

// NodeCheck is SHA-256 of a version's check value for a node.
type NodeCheck struct {
	Node string `json:"node"`
	Hash []byte `json:"hash"`
}

// RecoveryRoot is a next hardware root that has to get the keys.
type RecoveryRoot struct {
	Node      string `json:"node"`
	Root      uint32 `json:"root"`
	Suite     uint16 `json:"suite"`
	Agreement []byte `json:"agreement"`
	Proposal  string `json:"proposal"` // by which custodians approved it
}

// RestoreRequest is the body of POST /v1/recovery-keys/restore: what came out of a
// ceremony.
type RestoreRequest struct {
	Ceremony []byte     `json:"ceremony"` // exact bytes
	Consents []Consent  `json:"consents"` // sorted by custodian
	Restored []Restored `json:"restored"`
}

// Consent is a custodian's signature under a ceremony (approval.Consent).
type Consent struct {
	Custodian  string `json:"custodian"`
	Credential string `json:"credential"`
	Share      []byte `json:"share"`
	Signature  []byte `json:"signature"`
}

// Restored is a KEK version sealed to a next root (recovery.Restored).
type Restored struct {
	Node      string `json:"node"`
	Root      uint32 `json:"root"`
	Keyring   string `json:"keyring"`
	Version   uint32 `json:"version"`
	Sealed    []byte `json:"sealed"`
	Signature []byte `json:"signature"`
}

// RestoreResponse says how many copies were taken; those that the roots had are not
// counted.
type RestoreResponse struct {
	Taken int `json:"taken"`
}
