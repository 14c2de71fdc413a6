package approval

import (
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
)

// carriedFormat is the format of a Carried.
const carriedFormat = 1

// Carried is a proposal on its way to custodians whose computers have no network,
// and their statements on the way back: one file.
//
// What a custodian signs is Proposal alone, which names the history of the cluster
// (its lineage), the target's and the policy's revisions. Cluster and Voters are what
// the node said that exported it; they are there to show and to find whose credential
// it is, and nothing follows from them: a statement counts by the record of the
// custodian that the cluster has.
type Carried struct {
	Format     uint8       `cbor:"format"`
	Cluster    string      `cbor:"cluster"`    // genesis identity
	Proposal   []byte      `cbor:"proposal"`   // exact bytes
	Voters     []Voter     `cbor:"voters"`     // sorted by ID
	Statements []Statement `cbor:"statements"` // sorted by custodian, one each
}

// Voter is a custodian as a Carried names them.
type Voter struct {
	ID          string   `cbor:"id"`
	Site        string   `cbor:"site"`
	Credentials []string `cbor:"credentials"` // identifiers of those that count
}

// Marshal returns the canonical encoding.
func (c Carried) Marshal() []byte { return canon.Marshal(c) }

// ParseCarried decodes what Marshal writes and checks its shape; no statement is
// verified. Errors: kms.TooLarge, kms.Invalid.
func ParseCarried(b []byte) (Carried, Proposal, error) {
	fail := func(err error) (Carried, Proposal, error) { return Carried{}, Proposal{}, err }
	if len(b) > MaxApproved {
		return fail(kms.Errorf(kms.TooLarge, "the exported proposal has %d bytes; the limit is %d", len(b), MaxApproved))
	}
	var c Carried
	if err := canon.Unmarshal(b, &c); err != nil {
		return fail(kms.Wrap(kms.Invalid, err, "the exported proposal is not in canonical form", ""))
	}
	if c.Format != carriedFormat {
		return fail(kms.Errorf(kms.Invalid, "the exported proposal has format %d; this program knows %d", c.Format, carriedFormat))
	}
	p, err := ParseProposal(c.Proposal)
	if err != nil {
		return fail(err)
	}
	if p.Action == kms.ActionRecover {
		return fail(kms.Errorf(kms.Invalid, "a recover statement is no proposal of a cluster"))
	}
	if !isHex128(c.Cluster) {
		return fail(kms.Errorf(kms.Invalid, "the cluster of the exported proposal is not 32 hexadecimal digits"))
	}
	for i, v := range c.Voters {
		if err := kms.CheckName("custodian", v.ID); err != nil {
			return fail(err)
		}
		if err := kms.CheckName("site of custodian "+v.ID, v.Site); err != nil {
			return fail(err)
		}
		if i > 0 && c.Voters[i-1].ID >= v.ID {
			return fail(kms.Errorf(kms.Invalid, "the custodians are not sorted or repeat %s", v.ID))
		}
	}
	return c, p, c.checkStatements()
}

func (c Carried) checkStatements() error {
	if len(c.Statements) > MaxApprovers {
		return kms.Errorf(kms.TooLarge, "there are %d statements; the limit is %d", len(c.Statements), MaxApprovers)
	}
	id := ProposalID(c.Proposal)
	for i, s := range c.Statements {
		switch {
		case s.Verdict != Approve && s.Verdict != Reject || s.Proposal != id:
			return kms.Errorf(kms.Invalid, "the statement of custodian %q is no verdict on this proposal", s.Custodian)
		case i > 0 && c.Statements[i-1].Custodian >= s.Custodian:
			return kms.Errorf(kms.Invalid, "the statements are not sorted by custodian, or one has two")
		}
	}
	return nil
}

// With returns the file with one more statement, in place of the custodian's former.
func (c Carried) With(s Statement) Carried {
	c.Statements = Approved{Statements: c.Statements}.With(s).Statements
	return c
}

// Owner returns the custodian whom a credential belongs to, by what the file says.
func (c Carried) Owner(credential string) (string, bool) {
	i := slices.IndexFunc(c.Voters, func(v Voter) bool { return slices.Contains(v.Credentials, credential) })
	if i < 0 {
		return "", false
	}
	return c.Voters[i].ID, true
}

// Carry returns the file for a proposal, given as its exact bytes, of the cluster with
// that genesis identity.
func Carry(cluster string, proposal []byte, custodians []Custodian) Carried {
	c := Carried{Format: carriedFormat, Cluster: cluster, Proposal: proposal, Voters: []Voter{}, Statements: []Statement{}}
	for _, cu := range custodians {
		if cu.Revoked {
			continue
		}
		v := Voter{ID: cu.ID, Site: cu.Site, Credentials: []string{}}
		for _, k := range cu.Credentials {
			if cu.Active(k.ID) {
				v.Credentials = append(v.Credentials, k.ID)
			}
		}
		c.Voters = append(c.Voters, v)
	}
	slices.SortFunc(c.Voters, func(a, b Voter) int { return strings.Compare(a.ID, b.ID) })
	return c
}
