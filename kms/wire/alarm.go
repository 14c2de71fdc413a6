package wire

import "time"

// Alarms answers GET /v1/alarms: what is wrong, as far as this node knows. None of it keeps
// a node from being ready.
type Alarms struct {
	Node   string    `json:"node"`             // that was asked
	Time   time.Time `json:"time"`             // the cluster's clock
	Alarms []Alarm   `json:"alarms"`           // sorted by kind, then subject
	Hidden int       `json:"hidden,omitempty"` // keyrings that the caller may not read and that are left out
}

// Alarm is one thing that is wrong.
type Alarm struct {
	ID      string    `json:"id"`              // the same for as long as it is on, and where several nodes see it, at all of them
	Kind    string    `json:"kind"`            // AlarmOverdue and so on
	Subject string    `json:"subject"`         // what it is about: key/KEYRING/KEY, keyring/NAME, node/ID, site/ID, log/LOG
	Since   time.Time `json:"since,omitzero"`  // since when, or of a certificate until when
	Nodes   []string  `json:"nodes,omitempty"` // that it is about
	Text    string    `json:"text"`            // what it is and what helps
}

// The kinds of alarms.
const (
	AlarmOverdue     = "overdue"     // a key's rotation is overdue
	AlarmRotateKEK   = "rotate-kek"  // a removed node can open a KEK that is in use
	AlarmNode        = "node"        // a node is silent, behind, or cut off
	AlarmCertificate = "certificate" // a certificate has expired or soon will
	AlarmSuspicion   = "suspicion"   // a leader withholds commands, or a node signs times that are behind
	AlarmAudit       = "audit"       // a log is not cosigned, or not what it was
)
