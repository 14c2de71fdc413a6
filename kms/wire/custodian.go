package wire

// Possession is the proof that a custodian holds a new credential: field for field it is
// approval.Possession.
type Possession struct {
	Credential string `json:"credential"`
	Signature  []byte `json:"signature"`
}

// SuspendRequest is the body of POST /v1/custodians/{id}/suspensions.
type SuspendRequest struct {
	Statement Suspension `json:"statement"`
}

// Suspension is the signed statement by which a custodian suspends a credential of a
// colleague of the same site: field for field it is approval.Suspension.
type Suspension struct {
	Cluster    string `json:"cluster"` // lineage
	Custodian  string `json:"custodian"`
	Credential string `json:"credential"`
	Revision   uint64 `json:"revision"` // of the custodian
	By         string `json:"by"`       // custodian who signs
	With       string `json:"with"`     // credential that signs
	Reason     string `json:"reason"`
	Signature  []byte `json:"signature"`
}
