package chaos

import (
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// Kind is what was asked.
type Kind uint8

// The operations.
const (
	CreateKey Kind = iota + 1
	OpenProposal
	Vote
	ReadKey
	ReadProposal
)

func (k Kind) String() string {
	return [...]string{"", "create key", "open proposal", "vote", "read key", "read proposal"}[k]
}

// Outcome is how it was answered.
type Outcome uint8

// The outcomes. An operation that certainly had no effect and told nothing, because
// no leader or no node could be reached, is not part of a history.
const (
	OK       Outcome = iota + 1
	Unknown          // a write that may or may not have its effect, now or later
	NotFound         // the key or the proposal does not exist
	Exists           // the key exists, or the vote was given
	Refused          // not in this state
)

func (o Outcome) String() string {
	return [...]string{"", "ok", "unknown", "not found", "exists", "refused"}[o]
}

// Op is an operation with its answer.
type Op struct {
	Kind    Kind
	Key     string
	Node    string        // that answered last
	Client  int           // who asked
	Call    time.Duration // since the history began
	Return  time.Duration
	Outcome Outcome

	ID        string // of the proposal
	Proposal  int    // its number among those about the key, set by byKey
	Action    kms.Action
	Custodian int
	Verdict   verdict

	// The answer of ReadKey.
	Latest, Primary uint32
	Revision        uint64
	Suspended       bool
	IDs             []string // of live proposals
	Live            uint32   // the same as a set of numbers, set by byKey

	// The answer of ReadProposal.
	Progress progress
	Met      bool
	Votes    votes
}

// String shows an operation to people.
func (o Op) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s at %s", o.Kind, o.Node)
	switch o.Kind {
	case OpenProposal:
		fmt.Fprintf(&b, " #%d %s", o.Proposal, o.Action)
	case Vote:
		fmt.Fprintf(&b, " #%d %s verdict %d", o.Proposal, custodians[o.Custodian], o.Verdict)
	case ReadProposal:
		fmt.Fprintf(&b, " #%d", o.Proposal)
	}
	fmt.Fprintf(&b, ": %s", o.Outcome)
	switch {
	case o.Outcome != OK:
	case o.Kind == ReadKey:
		fmt.Fprintf(&b, ", latest %d, primary %d, revision %d, suspended %v, live %b", o.Latest, o.Primary, o.Revision, o.Suspended, o.Live)
	case o.Kind == ReadProposal:
		fmt.Fprintf(&b, ", %s, met %v, votes %v", o.Progress, o.Met, o.Votes)
	}
	return b.String()
}

// History is what was asked and answered. It is safe for concurrent use.
type History struct {
	start time.Time
	mu    sync.Mutex
	ops   []Op
}

// NewHistory begins a history.
func NewHistory() *History { return &History{start: time.Now()} }

// Now is the time since the beginning, by a clock that is never set.
func (h *History) Now() time.Duration { return time.Since(h.start) }

// Add records an operation.
func (h *History) Add(o Op) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.ops = append(h.ops, o)
}

// All returns the operations recorded so far.
func (h *History) All() []Op {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.ops)
}

// byKey splits a history into those of the keys and numbers the proposals about each.
func byKey(ops []Op) map[string][]Op {
	parts := map[string][]Op{}
	numbers := map[string]int{}
	count := map[string]int{}
	for _, o := range ops {
		if o.Kind == OpenProposal && o.ID != "" {
			if _, ok := numbers[o.ID]; !ok {
				numbers[o.ID] = count[o.Key]
				count[o.Key]++
			}
		}
	}
	for _, o := range ops {
		if o.ID != "" {
			n, ok := numbers[o.ID]
			if !ok {
				continue // about a proposal whose opening nobody was told of
			}
			o.Proposal = n
		}
		for _, id := range o.IDs {
			if n, ok := numbers[id]; ok {
				o.Live |= 1 << n
			}
		}
		if o.Kind == OpenProposal && o.Outcome == Unknown && o.ID == "" {
			continue // nobody can vote on it, and what it hinders is taken for granted
		}
		parts[o.Key] = append(parts[o.Key], o)
	}
	return parts
}
