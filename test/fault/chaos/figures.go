package chaos

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Figures are what a run has shown.
type Figures struct {
	faults   map[string]int
	total    int
	outcomes map[Outcome]int
	failed   int        // operations that certainly had no effect
	failover []failover // the quickest first
}

// failover is how long it took until writes were answered after a fault.
type failover struct {
	took  time.Duration
	after struck
}

// failovers returns, for every fault that took the leader away, how long it was until
// the first answer to a write that was asked for after it.
func failovers(ops []Op, faults []struck) (out []failover) {
	writes := slices.DeleteFunc(slices.Clone(ops), func(o Op) bool { return o.Outcome != OK || o.Kind == ReadKey || o.Kind == ReadProposal })
	slices.SortFunc(writes, func(a, b Op) int { return cmp.Compare(a.Return, b.Return) })
	for _, s := range faults {
		if !s.leader {
			continue
		}
		for _, o := range writes {
			if o.Call >= s.from {
				out = append(out, failover{o.Return - s.from, s})
				break
			}
		}
	}
	slices.SortFunc(out, func(a, b failover) int { return cmp.Compare(a.took, b.took) })
	return out
}

// times returns only how long they took.
func times(f []failover) (out []time.Duration) {
	for _, x := range f {
		out = append(out, x.took)
	}
	return out
}

// quantile returns the q-quantile of sorted durations, by the nearest rank.
func quantile(sorted []time.Duration, q float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	i := int(q*float64(len(sorted))+0.999999) - 1
	return sorted[min(max(i, 0), len(sorted)-1)]
}

// String shows the figures in a few lines.
func (f Figures) String() string {
	var kinds []string
	for _, k := range slices.Sorted(maps.Keys(f.faults)) {
		kinds = append(kinds, fmt.Sprintf("%s %d", k, f.faults[k]))
	}
	answered := f.outcomes[NotFound] + f.outcomes[Exists] + f.outcomes[Refused]
	took, longest := times(f.failover), ""
	if n := len(f.failover); n > 0 {
		s := f.failover[n-1].after
		longest = fmt.Sprintf(", longest %v (%s at %v)", quantile(took, 1).Round(ms), s.kind, s.from.Round(ms))
	}
	return fmt.Sprintf("%d faults: %s\noperations: ok %d, refused by the state %d, failed without effect %d, unknown %d\nfailover (%d times, with other faults at the same time): p50 %v, p99 %v%s",
		f.total, strings.Join(kinds, ", "), f.outcomes[OK], answered, f.failed, f.outcomes[Unknown],
		len(took), quantile(took, 0.5).Round(ms), quantile(took, 0.99).Round(ms), longest)
}
