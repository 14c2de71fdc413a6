package state

import (
	"iter"
	"slices"

	"github.com/conclave-kms/conclave/kms"
)

// ProposalQuery selects proposals. A zero field selects all.
type ProposalQuery struct {
	Open   bool       // only those that can still be carried out: open or authorised and not expired
	Action kms.Action // only those of an action
	Target string     // only those about a target
	Waits  string     // only those that wait for this custodian, see WaitsFor
	Before uint64     // only those opened before this place in the log
	Limit  int        // at most so many, the newest
}

// ProposalsOn returns the proposals about a target, newest first.
func (s *State) ProposalsOn(target string) []Proposal {
	return newestFirst(list[Proposal](s.read(), tableProposal, byTarget, prefixKey(target)))
}

// ProposalOpenedAt returns the proposal that was opened at a place in the log.
func (s *State) ProposalOpenedAt(index uint64) (Proposal, bool) {
	return find[Proposal](s.read(), tableProposal, bySeq, numberKey(^index))
}

// ProposalsBy returns the proposals that a query selects, newest first, and whether
// there are more of them beyond its limit. It looks at no more than an index holds: those
// about the target, else those that are open, else all in order until the limit is reached.
func (s *State) ProposalsBy(q ProposalQuery) (found []Proposal, more bool) {
	for p := range s.candidates(q) {
		switch {
		case q.Before != 0 && p.Index >= q.Before:
		case q.Action != "" && p.Content.Action != q.Action:
		case q.Open && (!p.live() || p.expired(s.clock)):
		case q.Waits != "" && !s.WaitsFor(p, q.Waits):
		case q.Limit > 0 && len(found) == q.Limit:
			return found, true
		default:
			found = append(found, p)
		}
	}
	return found, false
}

// candidates yields a superset of what a query selects, newest first.
func (s *State) candidates(q ProposalQuery) iter.Seq[Proposal] {
	switch {
	case q.Target != "":
		return slices.Values(s.ProposalsOn(q.Target))
	case q.Open || q.Waits != "":
		return slices.Values(newestFirst(s.reader().live()))
	}
	return func(yield func(Proposal) bool) {
		from := []byte{}
		if q.Before > 0 {
			from = numberKey(^(q.Before - 1))
		}
		it, err := s.read().LowerBound(tableProposal, bySeq, from)
		mustDB(err)
		for raw := it.Next(); raw != nil; raw = it.Next() {
			if !yield(*raw.(*Proposal)) {
				return
			}
		}
	}
}

func newestFirst(l []Proposal) []Proposal {
	slices.SortFunc(l, func(a, b Proposal) int { return compare(b.Index, a.Index) })
	return l
}

// WaitsFor reports whether a proposal waits for a custodian: it is open and not
// expired, the quorum is not reached, the custodian has not voted on it, and an approval of
// theirs would count under the rule now in force.
func (s *State) WaitsFor(p Proposal, custodian string) bool {
	r := s.reader()
	if p.Progress != Open || p.expired(s.clock) {
		return false
	}
	voted := slices.ContainsFunc(p.Votes, func(v Vote) bool { return v.Statement.Custodian == custodian && r.counts(v) })
	rule, err := r.rule(p.Content)
	if voted || err != nil || !rule.Quorum() {
		return false
	}
	counted := approvers(r, p)
	now := r.decide(p, rule, counted)
	return !now.Met && r.decide(p, rule, append(counted, custodian)).Approvals > now.Approvals
}
