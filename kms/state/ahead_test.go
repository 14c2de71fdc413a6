package state_test

import (
	"bytes"
	"sync"
	"testing"

	"github.com/conclave-kms/conclave/kms/state"
)

// TestRestoreSpread: who does the work, and in which order, changes nothing; what was not
// done is missed.
func TestRestoreSpread(t *testing.T) {
	s := rich(t).State()
	b := snapshot(t, s)
	restore := func(spread state.Spread) error {
		got, err := state.RestoreSpread(bytes.NewReader(b), no, spread)
		if err == nil && got.Hash() != s.Hash() {
			t.Error("another state came out")
		}
		return err
	}
	for name, spread := range map[string]state.Spread{
		"at once": func(n int, f func(int)) {
			var wg sync.WaitGroup
			for i := range n {
				wg.Go(func() { f(i) })
			}
			wg.Wait()
		},
		"backwards": func(n int, f func(int)) {
			for i := range n {
				f(n - 1 - i)
			}
		},
	} {
		if err := restore(spread); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := restore(func(int, func(int)) {}); err == nil {
		t.Error("accepted although nothing was done")
	}
	err := restore(func(n int, f func(int)) {
		for i := range n - 1 { // the last one is a command
			f(i)
		}
	})
	if err == nil {
		t.Error("accepted although the last statement was not opened")
	}
}
