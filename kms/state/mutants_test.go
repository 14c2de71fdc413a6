package state_test

import (
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
)

// batch is after how many mutants in a row the state is compared with that before
// them.
const batch = 500

// tally counts the mutants of each class, and how they were refused.
type tally struct {
	mutants map[string]int
	kinds   map[string]map[kms.Kind]int
}

func newTally() *tally {
	return &tally{mutants: make(map[string]int), kinds: make(map[string]map[kms.Kind]int)}
}

func (a *tally) add(class string, k kms.Kind, n int) {
	a.mutants[class] += n
	if a.kinds[class] == nil {
		a.kinds[class] = make(map[kms.Kind]int)
	}
	a.kinds[class][k] += n
}

// TestMutants applies commands and approvals that were changed, spliced, replayed or
// signed by those who may not: none is carried out, and the state stays what it was.
// CONCLAVE_MUTANTS says how many (make mutants); CONCLAVE_MUTANTS_SEED repeats a run.
func TestMutants(t *testing.T) {
	total, seed := 12_000, uint64(5)
	if s := os.Getenv("CONCLAVE_MUTANTS"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n <= 0 {
			t.Fatalf("CONCLAVE_MUTANTS: %q", s)
		}
		total = n
	}
	if s := os.Getenv("CONCLAVE_MUTANTS_SEED"); s != "" {
		n, err := strconv.ParseUint(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seed = n
	}
	sieges := []*siege{besiege(t), afterRecovery(t)}
	workers := runtime.GOMAXPROCS(0)
	tallies := make([]*tally, workers)
	began := time.Now()
	var all sync.WaitGroup
	for i := range workers {
		tallies[i] = newTally()
		n := total / workers
		if i == 0 {
			n += total % workers
		}
		all.Go(func() {
			for at := 0; at < n && !t.Failed(); at += batch {
				r := rand.New(rand.NewPCG(seed, uint64(i)<<32|uint64(at)))
				sieges[at/batch%len(sieges)].attack(t, r, min(batch, n-at), tallies[i])
			}
		})
	}
	all.Wait()
	took := time.Since(began)
	report(t, tallies, total, took)
}

// attack applies n mutants one after another, and then holds the state against that
// before them. Only nonces, outcomes, the index and the log may have changed.
func (g *siege) attack(t *testing.T, r *rand.Rand, n int, a *tally) {
	s := g.base
	last := ""
	for range n {
		class, raw := g.mutant(r)
		last = class
		next, res := s.Apply(s.Index()+1, raw)
		if res.Kind == 0 && !res.Duplicate || res.Halt || len(res.Events) != 0 {
			t.Errorf("%s: a mutant was carried out: events %v of %x", class, res.Events, raw)
			return
		}
		a.add(class, res.Kind, 1)
		s = next
	}
	if s.ContentHash() != g.content {
		t.Errorf("the state has changed under mutants that were all refused, the last one of the class %q", last)
	}
}

func report(t *testing.T, tallies []*tally, total int, took time.Duration) {
	t.Helper()
	sum := newTally()
	for _, a := range tallies {
		for class, kinds := range a.kinds {
			for k, n := range kinds {
				sum.add(class, k, n)
			}
		}
	}
	var names []string
	applied := 0
	for class, n := range sum.mutants {
		names = append(names, class)
		applied += n
	}
	slices.Sort(names)
	for _, class := range names {
		line, kinds := "", sum.kinds[class]
		var order []kms.Kind
		for k := range kinds {
			order = append(order, k)
		}
		slices.Sort(order)
		for _, k := range order {
			line += fmt.Sprintf(" %v %d", k, kinds[k])
		}
		t.Logf("%-52s %8d:%s", class, sum.mutants[class], line)
	}
	t.Logf("%d mutants of %d classes, 0 carried out, the state the same after every %d; %.1f s with %d processors", applied, len(names), batch, took.Seconds(), runtime.GOMAXPROCS(0))
	if len(names) != len(mutations) || applied != total {
		t.Errorf("%d mutants of %d classes were applied; there are %d classes", applied, len(names), len(mutations))
	}
}

// TestMutantsStartGood checks that what mutants are made of is good: each command
// would be carried out as it is, so it is the change that is refused.
func TestMutantsStartGood(t *testing.T) {
	seen := make(map[state.Type]bool)
	for i, g := range []*siege{besiege(t), afterRecovery(t)} {
		types := make(map[state.Type]bool)
		for _, c := range g.good {
			if err := g.base.Check(c.raw); err != nil {
				t.Errorf("siege %d: a command of type %d: %v", i, c.env.Type, err)
			}
			types[c.env.Type], seen[c.env.Type] = true, true
		}
		for _, c := range g.past {
			seen[c.env.Type] = true
		}
		t.Logf("siege %d: %d good commands of %d types, %d that were carried out, %d true votes", i, len(g.good), len(types), len(g.past), len(g.votes))
		if i == 0 && len(types) < 12 || len(types) < 4 {
			t.Errorf("siege %d: only %d types of commands", i, len(types))
		}
	}
	// Of these none is acceptable while the others are.
	apart := []state.Type{state.TypeAdoptRoot, state.TypeConfirmMembers, state.TypeRewrap, state.TypeConfirmRewrap, state.TypeRefuseRewrap, state.TypeRetireKEK, state.TypeSealRecovery, state.TypeRestoreCopy}
	for _, k := range state.Program("of this release").Kinds {
		if !seen[k.Type] && !slices.Contains(apart, k.Type) {
			t.Logf("no mutant is made of commands of type %d, version %d", k.Type, k.Version)
		}
	}
}
