//go:debug randseednop=0

package sim

import (
	"fmt"
	"maps"
	"math/rand"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/cryptotest"
	"time"
)

// The environment that make sim sets.
const (
	envSeed      = "SIM_SEED"      // of the first schedule; 0 or none: chosen
	envSchedules = "SIM_SCHEDULES" // how many; 1: told fault by fault
)

// again is how many schedules make sim plays twice.
const again = 40

// portion is how long schedules are played where nobody asks for a number.
const portion = 15 * time.Second

// TestSchedules plays schedules: those of make sim, or as many of fixed seeds as fit into the portion.
func TestSchedules(t *testing.T) {
	job := job{Seed: number(t, envSeed), Schedules: number(t, envSchedules)}
	if job.Schedules == 0 { // with Go's runtime as it is
		job.Seed, job.Schedules, job.Limit = 1, 1<<20, portion
	} else {
		job.Aloud = job.Schedules == 1
		o := newOverlay(t)
		o.exact()
		job.Binary = o.build()
	}
	if job.Seed == 0 {
		job.Seed = uint64(time.Now().UnixMilli())
	}
	began := time.Now()
	sum := job.run(t)
	t.Log(sum.text(time.Since(began)))
	if sum.played == 0 {
		t.Fatal("no schedule was played")
	}
	for _, r := range sum.failed {
		t.Errorf("schedule %d: %s\nplay it again: make sim SCHEDULES=1 SEED=%d", r.Seed, strings.Join(r.Failures, "; "), r.Seed)
	}
	if job.Binary != "" && !job.Aloud {
		job.Schedules = min(job.Schedules, again)
		if same := replays(sum, job.run(t)); same != int(job.Schedules) {
			t.Errorf("%d of %d schedules took the same way when they were played again", same, job.Schedules)
		}
	}
}

func number(t *testing.T, name string) uint64 {
	t.Helper()
	s := os.Getenv(name)
	if s == "" {
		return 0
	}
	n, err := strconv.ParseUint(s, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// found seeds the keys of all nodes and custodians, and makes the clusters.
func found(t *testing.T) *Worlds {
	cryptotest.SetGlobalRandom(t, 0)
	return New(t)
}

// play seeds what Raft takes its random time-outs from, and what signatures take, and plays.
func play(t *testing.T, w *Worlds, seed uint64, o Options) Report {
	//lint:ignore SA1019 Raft takes its time-outs from this source
	rand.Seed(int64(seed))
	cryptotest.SetGlobalRandom(t, seed)
	return w.Play(t, seed, o)
}

// replays counts the schedules of a second run from which the same log came about as in the first.
func replays(first, second *summary) int {
	same := 0
	for seed, trace := range second.traces {
		if was, ok := first.traces[seed]; ok && was == trace {
			same++
		}
	}
	return same
}

// TestReplay plays schedules twice, as make sim does, and demands that the same logs come about.
func TestReplay(t *testing.T) {
	o := newOverlay(t)
	o.exact()
	job := job{Seed: 1, Schedules: 6, Binary: o.build()}
	first, second := job.run(t), job.run(t)
	if len(first.failed) > 0 || len(first.traces) != int(job.Schedules) || len(second.traces) != int(job.Schedules) {
		t.Errorf("%d and %d of %d schedules were played: %+v %+v", len(first.traces), len(second.traces), job.Schedules, first.failed, second.failed)
	}
	if same := replays(first, second); same != int(job.Schedules) {
		t.Errorf("%d of %d schedules took the same way when they were played again", same, job.Schedules)
	}
}

// TestLyingDisks plays with disks that lose what they have acknowledged, and expects
// that the loss is found.
func TestLyingDisks(t *testing.T) {
	sum := job{Seed: 1, Schedules: 400, Lying: true, First: true, Limit: time.Minute}.run(t)
	if len(sum.failed) == 0 {
		t.Fatalf("nothing was found in %d schedules", sum.played)
	}
	t.Logf("found after %d schedules: %s", sum.played, sum.failed[0].Failures[0])
}

func counts(m map[string]int) string {
	var l []string
	for _, k := range slices.Sorted(maps.Keys(m)) {
		l = append(l, fmt.Sprintf("%s %d", k, m[k]))
	}
	return strings.Join(l, ", ")
}
