package approval

import (
	"fmt"

	"github.com/conclave-kms/conclave/kms"
)

// Decision is the outcome of counting approvals under a rule.
type Decision struct {
	Met       bool     `json:"met"`
	Approvals int      `json:"approvals"`         // distinct custodians counted
	Sites     int      `json:"sites"`             // distinct sites among them
	Missing   []string `json:"missing,omitempty"` // what is missing, in words; empty when Met
}

// Decide counts the approvals of a proposal by proposer (a SPIFFE ID) under a
// quorum rule. custodians looks up the record in force of a custodian; approvals
// are the identifiers of the custodians whose approvals verified, in any order,
// repetitions count once. Unknown and revoked custodians do not count, and the
// custodian who is the proposer counts only where the rule says so. A rule that
// is no quorum is never met.
func (r Rule) Decide(proposer string, custodians func(id string) (Custodian, bool), approvals []string) Decision {
	if !r.Quorum() {
		return Decision{Missing: []string{"the rule is not a quorum"}}
	}
	self, err := kms.ParseIdentity(proposer)
	if err != nil && !r.ProposerMayApprove {
		return Decision{Missing: []string{"a proposer with a valid identity"}}
	}
	counted := make(map[string]bool, len(approvals))
	sites := make(map[string]int)
	for _, id := range approvals {
		c, ok := custodians(id)
		if !ok || c.ID != id || c.Revoked || counted[id] {
			continue
		}
		if !r.ProposerMayApprove && self.Role == "custodian" && self.Name == id {
			continue
		}
		counted[id] = true
		sites[c.Site]++
	}
	d := Decision{Approvals: len(counted), Sites: len(sites)}
	if n := int(r.Approvals) - d.Approvals; n > 0 {
		d.Missing = append(d.Missing, fmt.Sprintf("%d more %s", n, word(n, "approval")))
	}
	if n := int(r.Sites) - d.Sites; n > 0 {
		d.Missing = append(d.Missing, fmt.Sprintf("custodians of %d more %s", n, word(n, "site")))
	}
	for _, s := range r.Required {
		if sites[s] == 0 {
			d.Missing = append(d.Missing, "a custodian of site "+s)
		}
	}
	if t := (tally{counted, sites}); r.Need != nil && !r.Need.met(t) {
		d.Missing = append(d.Missing, r.Need.missing(t)...)
	}
	d.Met = len(d.Missing) == 0
	return d
}

func word(n int, one string) string {
	if n == 1 {
		return one
	}
	return one + "s"
}
