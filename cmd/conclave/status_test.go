package main

import (
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms/wire"
)

// A node that runs signs its time every few seconds: the status says which is silent.
func TestLastHeard(t *testing.T) {
	clock := time.Date(2026, 1, 1, 0, 1, 0, 0, time.UTC)
	for at, want := range map[time.Time]string{
		clock.Add(-5 * time.Second):  "2026-01-01 00:00:55Z",
		clock.Add(-50 * time.Second): "2026-01-01 00:00:10Z (silent for 50s)",
		{}:                           "-",
	} {
		if got := lastHeard(at, clock); got != want {
			t.Errorf("%v: %q, want %q", at, got, want)
		}
	}
}

// The lease is told from where the node stands: a leader's own, what a follower has
// heard, or that there is none.
func TestLease(t *testing.T) {
	for want, r := range map[string]wire.Raft{
		"no leader confirmed by a majority since this node started":                                {QuorumMS: -1},
		"none; a majority last confirmed a leader 6s ago":                                          {State: "candidate", QuorumMS: 6000, LeaseMS: 500},
		"confirmed by a majority 20ms ago; this node steps down 500ms after the last confirmation": {State: "leader", Leader: "fr-1", QuorumMS: 20, LeaseMS: 500},
		"500ms; by the latest news here a majority confirmed the leader 900ms ago":                 {State: "follower", Leader: "fr-1", QuorumMS: 900, LeaseMS: 500},
	} {
		if got := lease(&r); got != want {
			t.Errorf("%+v: %q, want %q", r, got, want)
		}
	}
}

// Whoever looks at a node sees that its disk is nearly full.
func TestStatusTellsOfTheDisk(t *testing.T) {
	var full, empty strings.Builder
	statusTable(&full, wire.Status{Raft: &wire.Raft{ReadOnly: true}}, nil)
	statusTable(&empty, wire.Status{Raft: &wire.Raft{}}, nil)
	if !strings.Contains(full.String(), "nearly full") || strings.Contains(empty.String(), "nearly full") {
		t.Errorf("full: %s\nempty: %s", full.String(), empty.String())
	}
}

func TestAstrayClock(t *testing.T) {
	at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for own, want := range map[time.Time]string{at: "", at.Add(50 * time.Second): "", {}: "", at.Add(3 * time.Hour): "3h0m0s AHEAD", at.Add(-time.Hour): "1h0m0s BEHIND"} {
		if got := astray(own, at); want == "" && got != "" || !strings.Contains(got, want) {
			t.Errorf("%v: %q, want %q", own, got, want)
		}
	}
}
