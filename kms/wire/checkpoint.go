package wire

import "time"

// Checkpoints answers GET /v1/audit/checkpoints: how far the logs are cosigned.
type Checkpoints struct {
	Logs   []LogCheckpoint `json:"logs"`   // the cluster log, then the nodes' access logs
	Alarms []string        `json:"alarms"` // what is wrong, in words
}

// LogCheckpoint is the last checkpoint of a log.
type LogCheckpoint struct {
	Log      string        `json:"log"`               // "cluster" or "access/NODE"
	Site     string        `json:"site,omitempty"`    // of the node
	Size     uint64        `json:"size"`              // leaves; 0: no checkpoint yet
	Root     []byte        `json:"root,omitempty"`    // RFC 6962
	State    []byte        `json:"state,omitempty"`   // hash of the state, for the cluster log
	Restart  uint32        `json:"restart,omitempty"` // how often the log has begun anew
	Time     time.Time     `json:"time,omitzero"`     // cluster time at which it was submitted
	Cosigned uint64        `json:"cosigned"`          // leaves that a majority of the sites have cosigned
	WindowMS int64         `json:"window_ms"`         // how long leaves have waited for that, as this node sees it; 0: none waits
	Forked   bool          `json:"forked,omitempty"`  // its node has signed another log that contradicts this one
	Sites    []Cosignatory `json:"cosignatories"`     // the last cosignature of each site
	Note     []byte        `json:"note,omitempty"`    // the checkpoint as a C2SP signed note with the cosignatures of it
}

// Cosignatory is a site's last cosignature of a log.
type Cosignatory struct {
	Site string    `json:"site"`
	Node string    `json:"node"` // that signed
	Size uint64    `json:"size"`
	Time time.Time `json:"time,omitzero"` // cluster time
}
