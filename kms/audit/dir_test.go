package audit

import (
	"slices"
	"testing"
)

// TestMarks: the places at which the state is compared are few and spread evenly.
func TestMarks(t *testing.T) {
	var m marks
	const n = 50_000
	for i := range uint64(n) {
		for range 3 { // sites
			m.add(10*(i+1), []byte{byte(i)})
		}
	}
	got := sorted(m.all)
	if len(got) > maxMarks || len(got) < maxMarks/4 {
		t.Fatalf("%d places are kept", len(got))
	}
	for i := 1; i < len(got); i++ {
		if d := got[i] - got[i-1]; d > 40*n/uint64(len(got)) {
			t.Errorf("nothing is compared from %d to %d", got[i-1], got[i])
		}
	}
	if !slices.IsSorted(got) {
		t.Error("not in order")
	}
}
