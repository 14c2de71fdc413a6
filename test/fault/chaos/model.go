package chaos

import (
	"fmt"
	"strings"

	"github.com/anishathalye/porcupine"

	"github.com/conclave-kms/conclave/kms"
)

// The model is of one key with the proposals about it: each key is a partition of its
// own, since nothing that happens to one key bears on another. It is made anew
// from DESIGN.md, sections 6 and 7, and shares no code with kms/state.

// maxProposals bounds the proposals about one key.
const maxProposals = 24

// progress of a proposal.
type progress uint8

const (
	absent progress = iota
	open
	authorised
	executed
	rejected
	void
)

var progressNames = map[string]progress{"open": open, "authorised": authorised, "waiting": authorised, "executed": executed, "rejected": rejected, "void": void}

func (p progress) String() string {
	return [...]string{"absent", "open", "authorised", "executed", "rejected", "void"}[p]
}

func (p progress) live() bool { return p == open || p == authorised }

// verdict of one custodian.
type verdict uint8

const (
	none verdict = iota
	approve
	reject
)

// custodians are those of the coalition in the order of votes; the first two letters
// are the site.
var custodians = [...]string{"de-1", "de-2", "fr-1", "fr-2", "jp-1", "jp-2"}

type votes [len(custodians)]verdict

// count returns how many custodians, of how many sites, are of the kind.
func (v votes) count(kind func(verdict) bool) (people, sites int) {
	seen := map[string]bool{}
	for i, x := range v {
		if kind(x) {
			people++
			seen[custodians[i][:2]] = true
		}
	}
	return people, len(seen)
}

// needs returns the quorum of an action, as harness.Found writes it into the policy.
func needs(a kms.Action) int {
	if a == kms.ActionSuspend {
		return 1
	}
	return 2
}

// met reports whether the approvals make the quorum of the action.
func (v votes) met(a kms.Action) bool {
	people, sites := v.count(func(x verdict) bool { return x == approve })
	return people >= needs(a) && sites >= needs(a)
}

// possible reports whether those who have not rejected could make the quorum.
func (v votes) possible(a kms.Action) bool {
	people, sites := v.count(func(x verdict) bool { return x != reject })
	return people >= needs(a) && sites >= needs(a)
}

// proposal is comparable.
type proposal struct {
	action   kms.Action
	progress progress
	votes    votes
}

// settle decides where a live proposal stands after its votes have changed.
func (p *proposal) settle() {
	switch {
	case !p.votes.possible(p.action):
		p.progress = rejected
	case p.votes.met(p.action):
		p.progress = authorised
	default:
		p.progress = open
	}
}

// state is that of a key with its proposals; comparable.
type state struct {
	exists, suspended bool
	latest, primary   uint32
	revision          uint64
	proposals         [maxProposals]proposal // by their number in the history
}

// change raises the revision, which ends every live proposal about the key.
func (s *state) change() {
	s.revision++
	for i := range s.proposals {
		if s.proposals[i].progress.live() {
			s.proposals[i].progress = void
		}
	}
}

// moves returns the states that the nodes may reach from s in one step of their own:
// an authorised proposal is carried out, or the receipts for a new version come in.
func (s state) moves() (next []state) {
	for i, p := range s.proposals {
		if p.progress != authorised || !possibleEffect(s, p.action) {
			continue
		}
		n := s
		n.proposals[i].progress = executed
		switch p.action {
		case kms.ActionRotate:
			n.latest++
		case kms.ActionSuspend:
			n.suspended = true
		case kms.ActionResume:
			n.suspended = false
		}
		n.change()
		next = append(next, n)
	}
	for v := s.primary + 1; s.exists && v <= s.latest; v++ {
		n := s
		n.primary = v
		n.change()
		next = append(next, n)
	}
	return next
}

// possibleEffect reports whether an action can be carried out on the key as it is.
func possibleEffect(s state, a kms.Action) bool {
	return s.exists && s.suspended == (a == kms.ActionResume)
}

// reachable returns s and all states that the nodes may reach from it by themselves.
func reachable(s state) []state {
	all := []state{s}
	for i := 0; i < len(all); i++ {
	next:
		for _, n := range all[i].moves() {
			for _, old := range all {
				if n == old {
					continue next
				}
			}
			all = append(all, n)
		}
	}
	return all
}

// step returns the states after an operation with an answer; none if the answer is
// one that cannot be given in s.
func (s state) step(o Op) (after []state) {
	for _, from := range reachable(s) {
		if to, ok := from.answer(o); ok {
			after = append(after, to)
		}
	}
	return after
}

// answer returns the state after the operation, or false for an answer that is wrong.
func (s state) answer(o Op) (state, bool) {
	switch o.Kind {
	case CreateKey:
		return s.create(o)
	case OpenProposal:
		return s.openProposal(o)
	case Vote:
		return s.vote(o)
	case ReadKey:
		return s, s.showsKey(o)
	case ReadProposal:
		return s, s.showsProposal(o)
	}
	panic("no operation " + fmt.Sprint(o.Kind))
}

// Writes whose outcome nobody was told may have their effect at any time after the
// call, or never: they stay under way to the end of the history, and where the
// effect is impossible they have none.

func (s state) create(o Op) (state, bool) {
	switch {
	case o.Outcome == Exists:
		return s, s.exists
	case s.exists:
		return s, o.Outcome == Unknown
	}
	s.exists, s.latest, s.primary, s.revision = true, 1, 1, 1
	return s, true
}

func (s state) openProposal(o Op) (state, bool) {
	switch o.Outcome {
	case NotFound:
		return s, !s.exists
	case Refused, Exists:
		return s, s.exists // the reason may be another's proposal whose outcome is unknown
	}
	p := &s.proposals[o.Proposal]
	if !possibleEffect(s, o.Action) || p.progress != absent {
		return s, o.Outcome == Unknown
	}
	for _, other := range s.proposals {
		if other.action == o.Action && other.progress.live() {
			return s, o.Outcome == Unknown
		}
	}
	*p = proposal{action: o.Action, progress: open}
	return s, true
}

func (s state) vote(o Op) (state, bool) {
	p := &s.proposals[o.Proposal]
	given := p.votes[o.Custodian]
	switch {
	case o.Outcome == NotFound:
		return s, p.progress == absent
	case p.progress == absent:
		return s, o.Outcome == Unknown
	case o.Outcome == Exists:
		return s, given == o.Verdict
	case o.Outcome == Refused:
		return s, !p.progress.live() || given == reject
	case given == o.Verdict:
		return s, true // the very statement again
	case !p.progress.live() || given == reject:
		return s, o.Outcome == Unknown
	}
	p.votes[o.Custodian] = o.Verdict
	p.settle()
	return s, true
}

func (s state) showsKey(o Op) bool {
	if o.Outcome == NotFound || !s.exists {
		return o.Outcome == NotFound && !s.exists
	}
	live := uint32(0)
	for i, p := range s.proposals {
		if p.progress.live() {
			live |= 1 << i
		}
	}
	return o.Latest == s.latest && o.Primary == s.primary && o.Suspended == s.suspended && o.Revision == s.revision && o.Live == live
}

func (s state) showsProposal(o Op) bool {
	p := s.proposals[o.Proposal]
	if o.Outcome == NotFound || p.progress == absent {
		return o.Outcome == NotFound && p.progress == absent
	}
	if p.progress.live() && o.Met != p.votes.met(p.action) { // the decision itself
		return false
	}
	return o.Progress == p.progress && o.Votes == p.votes
}

// model is the model for porcupine.
func model() porcupine.Model {
	m := porcupine.NondeterministicModel{
		Init: func() []any { return []any{state{}} },
		Step: func(s, input, _ any) []any {
			var out []any
			for _, n := range s.(state).step(input.(Op)) {
				out = append(out, n)
			}
			return out
		},
		Equal:             func(a, b any) bool { return a.(state) == b.(state) },
		DescribeOperation: func(input, _ any) string { return input.(Op).String() },
		DescribeState:     func(s any) string { return s.(state).String() },
	}
	return m.ToModel()
}

// String shows a state to people.
func (s state) String() string {
	if !s.exists {
		return "no key"
	}
	var b strings.Builder
	fmt.Fprintf(&b, "latest %d, primary %d, revision %d, suspended %v", s.latest, s.primary, s.revision, s.suspended)
	for i, p := range s.proposals {
		if p.progress != absent {
			fmt.Fprintf(&b, "; #%d %s %s %v", i, p.action, p.progress, p.votes)
		}
	}
	return b.String()
}
