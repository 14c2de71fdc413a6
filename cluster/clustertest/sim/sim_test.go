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
	"time"
)

// The environment that make sim sets.
const (
	envSeed      = "SIM_SEED"      // of the first schedule; 0 or none: chosen
	envSchedules = "SIM_SCHEDULES" // how many; 1: told fault by fault
)

// portion is how long schedules are played where nobody asks for a number.
const portion = 15 * time.Second

// TestSchedules plays schedules: those of make sim, or as many of fixed seeds as fit into the portion.
func TestSchedules(t *testing.T) {
	seed, n := number(t, envSeed), number(t, envSchedules)
	job := job{Seed: seed, Schedules: n}
	switch {
	case n == 1:
		playAloud(t, seed)
		return
	case n == 0:
		job.Seed, job.Schedules, job.Limit = 1, 1<<20, portion
	case seed == 0:
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

func playAloud(t *testing.T, seed uint64) {
	w := New(t)
	r := play(t, w, seed, Options{Log: t.Logf})
	t.Logf("seed %d, %v simulated, trace %x: %s", seed, r.Elapsed, r.Trace, counts(r.Counts))
	for _, f := range r.Failures {
		t.Error(f)
	}
}

// play seeds what Raft takes its random time-outs from, and plays.
func play(t *testing.T, w *Worlds, seed uint64, o Options) Report {
	//lint:ignore SA1019 Raft takes its time-outs from this source
	rand.Seed(int64(seed))
	return w.Play(t, seed, o)
}

// TestReplay plays schedules twice and holds the logs that came about against each other.
func TestReplay(t *testing.T) {
	job := job{Seed: 1, Schedules: 6}
	first, second := job.run(t), job.run(t)
	same := 0
	for seed, trace := range first.traces {
		if second.traces[seed] == trace {
			same++
		}
	}
	t.Logf("%d of %d replays took the same way to the last entry", same, len(first.traces))
	if len(first.traces) != int(job.Schedules) || len(second.traces) != int(job.Schedules) {
		t.Errorf("%d and %d of %d schedules were played: %v %v", len(first.traces), len(second.traces), job.Schedules, first.failed, second.failed)
	}
	if same == 0 {
		t.Error("no schedule replays")
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
