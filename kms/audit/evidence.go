package audit

import (
	"bytes"
	"encoding/json"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

// EvidenceFormat is the format of evidence files of this program, and
// MaxEvidence the longest file it reads, in bytes.
const (
	EvidenceFormat = 2
	MaxEvidence    = 64 << 20
)

// Evidence proves offline that a guarded action was authorised and, for a
// rotation, that the resident nodes can open the new version. It holds signed
// bytes only: what follows from them is derived when it is verified. Its file is
// JSON with byte strings in base64 (RFC 4648, section 4).
type Evidence struct {
	Format     int        `json:"format"`
	Cluster    string     `json:"cluster"`              // kms.ClusterID of the genesis
	Genesis    []byte     `json:"genesis"`              // state.SignedGenesis
	Recoveries [][]byte   `json:"recoveries,omitempty"` // approved statements of the recoveries before, where the cluster went on from a backup
	Governance []Decision `json:"governance"`           // on policies, custodians and nodes' hardware, and the import of the target key, all before Decision, as executed
	Decision   Decision   `json:"decision"`             // what the evidence is for
	Later      []Decision `json:"later,omitempty"`      // as Governance, after Decision, where a receipt is signed with a hardware root approved since
	Keyring    []byte     `json:"keyring,omitempty"`    // the command that created the keyring of the target key
	Key        []byte     `json:"key,omitempty"`        // the command that created the key, unless erased with its version 1
	KeyID      []byte     `json:"key_id,omitempty"`     // the key's identifier, where Key is erased and the receipts' signatures confirm it
	Receipts   [][]byte   `json:"receipts,omitempty"`   // the nodes' receipt commands for a rotation, sorted by node
}

// Decision is a proposal with what authorised it and the command that carried it
// out.
type Decision struct {
	Proposal  []byte               `json:"proposal"`           // exact bytes
	Open      []byte               `json:"open"`               // the command that opened it
	Votes     []approval.Statement `json:"votes"`              // those that counted when it was carried out, sorted by custodian
	Execution []byte               `json:"execution"`          // Execute, CommitRotation for a rotation, ImportKey for an import
	Adoption  []byte               `json:"adoption,omitempty"` // for a node's hardware root: the command by which the node adopted it

	Suspensions [][]byte `json:"suspensions,omitempty"` // commands that suspended credentials after the decision before and before this one's execution
}

// Marshal returns the evidence file.
func (e Evidence) Marshal() []byte {
	if e.Governance == nil {
		e.Governance = []Decision{}
	}
	e.Governance = slices.Clone(e.Governance)
	e.Later = slices.Clone(e.Later)
	for _, l := range [][]Decision{e.Governance, e.Later} {
		for i := range l {
			l[i] = l[i].normal()
		}
	}
	e.Decision = e.Decision.normal()
	b, err := json.MarshalIndent(e, "", "  ")
	if err != nil {
		panic("audit: evidence has a JSON form: " + err.Error()) // impossible: strings and bytes alone
	}
	return append(b, '\n')
}

func (d Decision) normal() Decision {
	if d.Votes == nil {
		d.Votes = []approval.Statement{}
	}
	return d
}

// ParseEvidence reads exactly what Marshal writes: any other JSON text, also of
// the same value, is refused. Errors: kms.TooLarge, kms.Invalid.
func ParseEvidence(b []byte) (Evidence, error) {
	if len(b) > MaxEvidence {
		return Evidence{}, kms.Errorf(kms.TooLarge, "the evidence has %d bytes; the limit is %d", len(b), MaxEvidence)
	}
	var e Evidence
	dec := json.NewDecoder(bytes.NewReader(b))
	dec.DisallowUnknownFields()
	if err := dec.Decode(&e); err != nil {
		return Evidence{}, kms.Wrap(kms.Invalid, err, "this is not an evidence file", "")
	}
	if e.Format != EvidenceFormat {
		return Evidence{}, kms.Errorf(kms.Invalid, "the evidence has format %d; this program knows %d", e.Format, EvidenceFormat)
	}
	if !bytes.Equal(e.Marshal(), b) {
		return Evidence{}, kms.Errorf(kms.Invalid, "the evidence file has been changed or reformatted; use it exactly as it was written")
	}
	return e, nil
}

// Report says what verified evidence proves, and each check in words.
type Report struct {
	Cluster     string            `json:"cluster"`      // derived from the genesis
	ClusterName string            `json:"cluster_name"` // by the genesis
	Pinned      bool              `json:"pinned"`       // the cluster is the one that the verifier asked for
	Proposal    string            `json:"proposal"`     // identifier
	Content     approval.Proposal `json:"content"`
	Rule        approval.Rule     `json:"rule"`                // that was in force
	Approvals   []Approval        `json:"approvals,omitempty"` // that verified
	Rejections  []Approval        `json:"rejections,omitempty"`
	Executor    string            `json:"executor"`            // node that carried it out
	Executed    int64             `json:"executed"`            // when, by that node's signed time, Unix milliseconds
	Site        string            `json:"site,omitempty"`      // of the node, for a decision on one
	Version     uint32            `json:"version,omitempty"`   // new key version, for a rotation
	Generated   kms.Generated     `json:"generated,omitempty"` // where it was made, for a rotation of protection hardware
	Receipts    []string          `json:"receipts,omitempty"`  // nodes that proved that they can open it
	Checks      []string          `json:"checks"`              // done, all of them passed
	Notes       []string          `json:"notes,omitempty"`     // what this evidence does not prove
}

// Approval is a verified statement of a custodian.
type Approval struct {
	Custodian  string `json:"custodian"`
	Site       string `json:"site"`
	Credential string `json:"credential"`
}
