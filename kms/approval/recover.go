package approval

import (
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
)

// Limits of a recover statement.
const (
	MaxEpoch     = 1 << 20   // epochs of a cluster
	MaxApprovers = 64        // custodians' statements in one file
	MaxVoters    = 128       // nodes that begin as voters
	MaxApproved  = 512 << 10 // bytes of an Approved
)

// RecoverParams are the parameters of the action recover: with which state a new
// epoch of the cluster begins, and who votes in it. The target is
// "cluster/LINEAGE", which is the proposal's cluster too: the history that is given
// up after this state. Revision is the epoch of that history. The cluster's clock
// begins at the proposal's time of creation.
type RecoverParams struct {
	Cluster string   `cbor:"cluster" json:"cluster"`   // genesis identity
	State   []byte   `cbor:"state" json:"state"`       // SHA-256 over the records of the state, as in its snapshot's end record
	Index   uint64   `cbor:"index" json:"index"`       // of the last command in the state
	LogSize uint64   `cbor:"log-size" json:"log_size"` // leaves of its cluster log
	LogRoot []byte   `cbor:"log-root" json:"log_root"` // RFC 6962 root of its cluster log
	Epoch   uint64   `cbor:"epoch" json:"epoch"`       // that begins, above Revision
	Voters  []string `cbor:"voters" json:"voters"`     // nodes that vote at first, sorted; all others do not
}

// RecoverParams decodes the parameters of the action recover.
func (p Proposal) RecoverParams() (RecoverParams, error) { return params[RecoverParams](p) }

// ClusterTarget returns the target of a recover statement.
func ClusterTarget(lineage string) string { return TargetCluster + "/" + lineage }

// validateRecover checks the parameters of the action recover.
func (p Proposal) validateRecover(lineage string) error {
	params, err := p.RecoverParams()
	if err != nil {
		return err
	}
	switch {
	case lineage != p.Cluster:
		return kms.Errorf(kms.Invalid, "the target and the proposal name different clusters")
	case !isHex128(params.Cluster):
		return kms.Errorf(kms.Invalid, "the cluster in the parameters is not 32 hexadecimal digits")
	case len(params.State) != sha256.Size || len(params.LogRoot) != sha256.Size:
		return kms.Errorf(kms.Invalid, "the hash of the state or the root of its log has not %d bytes", sha256.Size)
	case params.Epoch <= p.Revision || params.Epoch > MaxEpoch:
		return kms.Errorf(kms.Invalid, "epoch %d does not come after epoch %d, or is above %d", params.Epoch, p.Revision, MaxEpoch)
	case len(params.Voters) == 0 || len(params.Voters) > MaxVoters:
		return kms.Errorf(kms.Invalid, "there are %d voters; 1 to %d can begin", len(params.Voters), MaxVoters)
	}
	return checkNames("voter", params.Voters)
}

// Approved is a proposal that is decided without a cluster, with its custodians'
// approvals: one file, the same for every node that takes it. Statements are
// sorted by custodian, one each.
type Approved struct {
	Proposal   []byte      `cbor:"proposal"`
	Statements []Statement `cbor:"statements"`
}

// Marshal returns the canonical encoding, which the identifier is derived from.
func (a Approved) Marshal() []byte { return canon.Marshal(a) }

// ParseApproved decodes what Marshal writes and checks its shape; the statements are
// not verified. Errors: kms.TooLarge, kms.Invalid.
func ParseApproved(b []byte) (Approved, Proposal, error) {
	if len(b) > MaxApproved {
		return Approved{}, Proposal{}, kms.Errorf(kms.TooLarge, "the approved proposal has %d bytes; the limit is %d", len(b), MaxApproved)
	}
	var a Approved
	if err := canon.Unmarshal(b, &a); err != nil {
		return Approved{}, Proposal{}, kms.Wrap(kms.Invalid, err, "the approved proposal is not in canonical form", "")
	}
	p, err := ParseProposal(a.Proposal)
	if err != nil {
		return Approved{}, Proposal{}, err
	}
	if len(a.Statements) > MaxApprovers {
		return Approved{}, Proposal{}, kms.Errorf(kms.TooLarge, "there are %d statements; the limit is %d", len(a.Statements), MaxApprovers)
	}
	id := ProposalID(a.Proposal)
	for i, s := range a.Statements {
		switch {
		case s.Verdict != Approve || s.Proposal != id:
			return Approved{}, Proposal{}, kms.Errorf(kms.Invalid, "the statement of custodian %q is no approval of this proposal", s.Custodian)
		case i > 0 && a.Statements[i-1].Custodian >= s.Custodian:
			return Approved{}, Proposal{}, kms.Errorf(kms.Invalid, "the statements are not sorted by custodian, or one has two")
		}
	}
	return a, p, nil
}

// With returns the file with one more statement, in place of the custodian's former.
func (a Approved) With(s Statement) Approved {
	l := slices.DeleteFunc(slices.Clone(a.Statements), func(x Statement) bool { return x.Custodian == s.Custodian })
	l = append(l, s)
	slices.SortFunc(l, func(x, y Statement) int { return strings.Compare(x.Custodian, y.Custodian) })
	return Approved{Proposal: a.Proposal, Statements: l}
}

const approvedDomain = "conclave/approved/v1\x00"

// ApprovedID returns the identifier of an approved proposal given as its exact
// bytes, approvals included: 32 hexadecimal digits, the first 16 bytes of SHA-256 over
// a domain string and b.
func ApprovedID(b []byte) string {
	h := sha256.New()
	h.Write([]byte(approvedDomain))
	h.Write(b)
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// RecoverRule returns what a recover statement takes under the rule of the
// governance policy for it: at least two approvals from two sites, whatever the
// rule says, so that no nation can take the cluster back to a backup alone.
func RecoverRule(r Rule) Rule {
	r.Approvals, r.Sites = max(r.Approvals, 2), max(r.Sites, 2)
	return r
}
