package audit

import (
	"maps"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
)

// suspend verifies a suspension of a credential, a signed command with a custodian's
// statement in it, and puts it into force.
func (w *replay) suspend(raw []byte) (approval.Suspension, error) {
	const what = "the suspension of a credential"
	e, c, err := command[state.SuspendCredential](w, what, raw)
	if err != nil {
		return c.Statement, err
	}
	s := c.Statement
	if s.Cluster != e.Cluster {
		return s, refuse(kms.Invalid, nil, "%s is for another cluster than its command", what)
	}
	of, ok := w.custodian(s.Custodian)
	if !ok {
		return s, refuse(kms.NotFound, nil, "%s: there is no custodian %s", what, s.Custodian)
	}
	by, ok := w.custodian(s.By)
	if !ok {
		return s, refuse(kms.Denied, nil, "%s: there is no custodian %s", what, s.By)
	}
	if err := s.Verify(of, by); err != nil {
		return s, err
	}
	next := of.Suspend(s.Credential)
	next.Revision++
	w.custodians[next.ID] = next
	return s, approval.Restorable(w.sortedPolicies(), w.sortedCustodians(), s.By)
}

// suspendBefore takes the suspensions that come before a decision.
func (w *replay) suspendBefore(d Decision, out *decided) error {
	for _, raw := range d.Suspensions {
		s, err := w.suspend(raw)
		if err != nil {
			return err
		}
		out.suspensions = append(out.suspensions, s)
	}
	return nil
}

func (r *Report) reportSuspensions(out decided) {
	for _, s := range out.suspensions {
		r.passed("Custodian %s signed that credential %s of %s is suspended; from then on it does not count.", s.By, s.Credential, s.Custodian)
	}
}

// collectSuspensions adds the suspensions between the last decision that was collected
// and a proposal's execution, and returns the custodians after them.
func (w *replay) collectSuspensions(s *state.State, p state.Proposal, d *Decision) map[string]approval.Custodian {
	now := maps.Clone(w.custodians)
	for _, x := range s.Suspensions() {
		if x.Index <= w.collected || x.Index >= p.Executed {
			continue
		}
		d.Suspensions = append(d.Suspensions, x.Statement)
		now[x.Custodian] = now[x.Custodian].Suspend(x.Credential)
	}
	w.collected = max(w.collected, p.Executed)
	return now
}

// countable are the votes that count by the custodians given, sorted by custodian.
func countable(p state.Proposal, custodians map[string]approval.Custodian) []approval.Statement {
	votes := []approval.Statement{}
	for _, v := range p.Votes {
		if c, ok := custodians[v.Statement.Custodian]; ok && v.Statement.Verify(c, p.Bytes) == nil {
			votes = append(votes, v.Statement)
		}
	}
	slices.SortFunc(votes, func(a, b approval.Statement) int { return strings.Compare(a.Custodian, b.Custodian) })
	return votes
}
