package cluster

import (
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
)

func TestRecent(t *testing.T) {
	var r recent
	if _, ok := r.of(0, nil); ok {
		t.Error("a result of no entry")
	}
	r.add([]byte("command"), state.Result{Index: 7, Kind: kms.Denied})
	if got, ok := r.of(7, []byte("command")); !ok || got.Kind != kms.Denied {
		t.Errorf("%v %v", got, ok)
	}
	// A leader that answers with another entry, or a place in the log that holds
	// another command, is not believed.
	for _, index := range []uint64{0, 6, 8, 7 + keepResults} {
		if _, ok := r.of(index, []byte("command")); ok {
			t.Errorf("found at %d", index)
		}
	}
	if _, ok := r.of(7, []byte("another")); ok {
		t.Error("found another command")
	}
	r.add([]byte("later"), state.Result{Index: 7 + keepResults})
	if _, ok := r.of(7, []byte("command")); ok {
		t.Error("found what was overwritten")
	}
}
