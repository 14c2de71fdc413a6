package wire

import "time"

// Recoveries answers GET /v1/recoveries: the times that custodians had the cluster go
// on from a backup.
type Recoveries struct {
	Recoveries []Recovery `json:"recoveries"`
}

// Recovery is the beginning of an epoch.
type Recovery struct {
	Epoch      uint64    `json:"epoch"`
	ID         string    `json:"id"`            // of the approved statement
	Lineage    string    `json:"lineage"`       // of the history that it began
	Index      uint64    `json:"index"`         // of the last command of the backup
	LogSize    uint64    `json:"log_size"`      // leaves of the backup's cluster log
	Time       time.Time `json:"time,omitzero"` // when the statement was written
	Reason     string    `json:"reason"`
	Voters     []string  `json:"voters"`     // that the epoch began with
	Custodians []string  `json:"custodians"` // who approved
	Approved   []byte    `json:"approved"`   // the statement with their signatures
}
