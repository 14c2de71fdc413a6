package wire

import "time"

// Drift answers GET /v1/drift: what is not as it should be, as far as this node knows.
type Drift struct {
	Node     string    `json:"node"`             // that was asked
	Time     time.Time `json:"time"`             // the cluster's clock
	Findings []Finding `json:"findings"`         // those that ask for something first
	Act      int       `json:"act"`              // how many ask for something
	Unknown  []string  `json:"unknown"`          // what this node cannot know, a sentence each
	Hidden   int       `json:"hidden,omitempty"` // keyrings that the caller may not read and that are left out
}

// Finding is one thing in a drift report.
type Finding struct {
	Kind    string    `json:"kind"`              // DriftOverdue and so on
	Act     bool      `json:"act"`               // it asks for something; else it is worth knowing
	Subject string    `json:"subject"`           // what it is about: key/KEYRING/KEY, keyring/NAME, node/ID, site/ID, custodian/ID, suite/NAME
	Version uint32    `json:"version,omitempty"` // of the key, or of the KEK
	Nodes   []string  `json:"nodes,omitempty"`   // that it is about
	Since   time.Time `json:"since,omitzero"`    // since when, or from when on
	Text    string    `json:"text"`              // what it is and what helps
}

// The kinds of findings.
const (
	DriftOverdue     = "overdue"     // a key's rotation is overdue
	DriftRotateKEK   = "rotate-kek"  // a removed node can open a KEK that is in use
	DriftReceipt     = "receipt"     // a node has not proved that it can open a version
	DriftDeactivated = "deactivated" // a version that is no longer active is asked for
	DriftOldVersion  = "old-version" // a version that is not the primary one is in use
	DriftUnused      = "unused"      // a version that is not the primary one has not been used for a while
	DriftSuite       = "suite"       // something does not withstand a quantum adversary
	DriftForbidden   = "forbidden"   // something is of a suite that its policy forbids
	DriftNode        = "node"        // a node is behind or silent
	DriftRelease     = "release"     // a node's release is older than others'
	DriftCertificate = "certificate" // a certificate has expired or soon will
)
