package wire

import "time"

// Keyrings answers GET /v1/keyrings.
type Keyrings struct {
	Keyrings []Keyring `json:"keyrings"`
}

// Keyring answers GET /v1/keyrings/{keyring} and the creation of one.
type Keyring struct {
	Name           string    `json:"name"`
	Residency      []string  `json:"residency"`  // sites that may open it, sorted
	Protection     string    `json:"protection"` // software or hardware
	Policy         string    `json:"policy"`     // that decides about its keys
	Receipts       string    `json:"receipts"`   // every-node or every-site
	MaxStalenessMS int64     `json:"max_staleness_ms"`
	Survive        bool      `json:"survive"` // beyond MaxStaleness go on with decrypt and verify
	KEK            uint32    `json:"kek"`     // version of the key-encryption key; 0 with protection hardware, which has none
	Keys           int       `json:"keys"`    // how many
	Nodes          []NodeAPI `json:"nodes"`   // that can open it
	Resident       bool      `json:"resident"`
	Created        time.Time `json:"created"`
	Creator        string    `json:"creator"` // SPIFFE ID
	Revision       uint64    `json:"revision"`

	Rotation *KEKRotation `json:"rotation,omitempty"` // of the KEK, while one is under way or wanted
}

// KEKRotation is how far the rotation of a keyring's KEK has come. It is over when
// only one KEK version is left.
type KEKRotation struct {
	Target    uint32          `json:"target"`              // newest KEK version; it is in use when the receipts are in
	Receipts  []Receipt       `json:"receipts,omitempty"`  // for Target, one for each node asked
	Versions  int             `json:"versions"`            // key versions of the keyring
	Done      int             `json:"done"`                // wrapped under the KEK version in use, as every node confirmed
	Rewrapped int             `json:"rewrapped"`           // wrapped under it, and waiting for confirmations
	Left      int             `json:"left"`                // still to be rewrapped
	Live      []uint32        `json:"live"`                // KEK versions that are not retired
	Awaits    []string        `json:"awaits,omitempty"`    // nodes that have yet to give a receipt or a confirmation
	Refused   []RefusedRewrap `json:"refused,omitempty"`   // what nodes refused
	Proposals []string        `json:"proposals,omitempty"` // open proposals to rotate
	Note      string          `json:"note"`                // what it waits for, a sentence
}

// RefusedRewrap is a batch of rewrapped key versions that a node refused: one does not
// open there or holds another key. What was in use stays in use.
type RefusedRewrap struct {
	KEK       uint32    `json:"kek"`
	Rewrapped string    `json:"rewrapped_by"` // node; it rewraps no more for this KEK version
	Refused   string    `json:"refused_by"`   // node
	Key       string    `json:"key"`
	Version   uint32    `json:"version"`
	Time      time.Time `json:"time"`
}

// NodeAPI names a node and where its native API is.
type NodeAPI struct {
	ID   string `json:"id"`
	Site string `json:"site"`
	API  string `json:"api"` // https URL
}

// CreateKeyringRequest is the body of POST /v1/keyrings.
type CreateKeyringRequest struct {
	Name           string   `json:"name"`
	Residency      []string `json:"residency"`                  // site ids, any order, at least one
	Protection     string   `json:"protection,omitempty"`       // software (default) or hardware
	Policy         string   `json:"policy"`                     // name of an existing policy
	Receipts       string   `json:"receipts,omitempty"`         // default "every-node"
	MaxStalenessMS int64    `json:"max_staleness_ms,omitempty"` // default 30000
	Survive        bool     `json:"survive,omitempty"`
}

// Keys answers GET /v1/keyrings/{keyring}/keys.
type Keys struct {
	Keys []Key `json:"keys"` // without Versions
}

// Key answers GET /v1/keyrings/{keyring}/keys/{key} and the creation of one.
type Key struct {
	Keyring          string       `json:"keyring"`
	Name             string       `json:"name"`
	ID               string       `json:"id"` // 32 hexadecimal digits, part of every ciphertext
	Purpose          string       `json:"purpose"`
	Algorithm        string       `json:"algorithm"`
	Protection       string       `json:"protection"` // of its keyring: software or hardware
	Suspended        bool         `json:"suspended"`
	Primary          uint32       `json:"primary"` // version that new operations use, 0 when none
	Latest           uint32       `json:"latest"`  // highest version number given
	RotationPeriodMS int64        `json:"rotation_period_ms,omitempty"`
	NextRotation     time.Time    `json:"next_rotation,omitzero"`
	Overdue          bool         `json:"overdue,omitempty"` // NextRotation has passed
	Created          time.Time    `json:"created"`
	Rotated          time.Time    `json:"rotated,omitzero"` // when Primary became primary
	Creator          string       `json:"creator"`
	Revision         uint64       `json:"revision"`
	Versions         []KeyVersion `json:"versions,omitempty"`
	Proposals        []string     `json:"proposals,omitempty"` // ids of open and authorised proposals on it
}

// KeyVersion is a version of a key, never its material.
type KeyVersion struct {
	Version   uint32    `json:"version"`
	State     string    `json:"state"` // SP 800-57 state
	Primary   bool      `json:"primary,omitempty"`
	KEK       uint32    `json:"kek"`                  // version of the KEK that wraps it; 0 with protection hardware
	Generated string    `json:"generated,omitempty"`  // imported (brought from outside); else protection hardware: device (inside it) or host (wrapped for the devices, then wiped)
	PublicKey []byte    `json:"public_key,omitempty"` // sign keys: SEC1 uncompressed point or Ed25519 key
	Created   time.Time `json:"created"`
	Activated time.Time `json:"activated,omitzero"`
	Proposal  string    `json:"proposal,omitempty"` // that authorised it
	Receipts  []Receipt `json:"receipts,omitempty"` // one for each resident node; none for version 1 of protection software

	Use *VersionUse `json:"use,omitempty"` // of a version that has material
}

// VersionUse is what the nodes have reported of a version's use, to the hour. They do so
// every hour.
type VersionUse struct {
	Last        time.Time `json:"last,omitzero"`         // end of the hour of the last use that was reported
	Known       bool      `json:"known"`                 // every node that can use it has reported lately; else it may have been used at any time
	UnusedSince time.Time `json:"unused_since,omitzero"` // if known: nobody has used it after this time
	Silent      []string  `json:"silent,omitempty"`      // the nodes that have not reported
}

// Receipt says whether a resident node has proved that it can open a version.
type Receipt struct {
	Node     string `json:"node"`
	Site     string `json:"site"`
	Received bool   `json:"received"`
}

// CreateKeyRequest is the body of POST /v1/keyrings/{keyring}/keys. It has to
// reach a node where the keyring is resident.
type CreateKeyRequest struct {
	Name             string `json:"name"`
	Purpose          string `json:"purpose"`                      // encrypt, mac or sign
	Algorithm        string `json:"algorithm,omitempty"`          // default: the purpose's first
	RotationPeriodMS int64  `json:"rotation_period_ms,omitempty"` // 0: on request only
}

// ImportKeyRequest is the body of POST /v1/keyrings/{keyring}/keys/{key}/import. It has
// to reach the node to which the material is sealed.
type ImportKeyRequest struct {
	Proposal string `json:"proposal"` // id of the authorised proposal
	Sealed   []byte `json:"sealed"`   // pqc.PublicKey.Seal under approval.ImportBinding
}
