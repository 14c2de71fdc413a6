package main

import (
	"testing"
	"time"
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
