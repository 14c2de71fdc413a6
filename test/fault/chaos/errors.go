package chaos

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// explained are the kinds of error that faults explain. What a state machine refuses is
// held against the model instead.
var explained = []kms.Kind{kms.Unknown, kms.Unavailable, kms.Stale, kms.ReadOnly}

// answers are the kinds of error that say something about a key or a proposal.
var answers = []kms.Kind{kms.NotFound, kms.Exists, kms.Conflict}

// errorCounts counts the tries by what came of them, and keeps what no fault explains.
type errorCounts struct {
	mu   sync.Mutex
	kind map[string]int
	list []string
}

// count notes the outcome of a try.
func (e *errorCounts) count(node string, at time.Duration, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.kind == nil {
		e.kind = map[string]int{}
	}
	if err == nil {
		e.kind["ok"]++
		return
	}
	k := kms.KindOf(err)
	e.kind[k.String()]++
	if !slices.Contains(explained, k) && !slices.Contains(answers, k) {
		e.list = append(e.list, fmt.Sprintf("%s after %v: %s: %v", node, at.Round(time.Millisecond), k, err))
	}
}

// odd notes what should never happen.
func (e *errorCounts) odd(what string, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.list = append(e.list, fmt.Sprintf("%s: %v", what, err))
}

// unexplained returns what no fault explains.
func (e *errorCounts) unexplained() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	return slices.Clone(e.list)
}

// String lists the counts by kind.
func (e *errorCounts) String() string {
	e.mu.Lock()
	defer e.mu.Unlock()
	var out []string
	for _, k := range slices.Sorted(maps.Keys(e.kind)) {
		out = append(out, fmt.Sprintf("%s %d", k, e.kind[k]))
	}
	return strings.Join(out, ", ")
}
