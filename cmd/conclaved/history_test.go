package main

import (
	"path/filepath"
	"testing"

	"github.com/conclave-kms/conclave/kms/audit"
)

// A node whose Raft log yields another history than it had applied is told so when
// it has caught up with its own past.
func TestSameHistory(t *testing.T) {
	log, err := audit.OpenClusterLog(filepath.Join(t.TempDir(), "log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	for i := range uint64(3) {
		if err := log.Append(i+1, []byte("command"), []byte{byte(i)}); err != nil {
			t.Fatal(err)
		}
	}
	own, _ := log.Root()
	other := func() []byte { return make([]byte, 32) }
	if err := sameHistory(log, 3, func() []byte { return own }); err != nil {
		t.Errorf("the same: %v", err)
	}
	if err := sameHistory(log, 2, other); err != nil {
		t.Errorf("on the way: %v", err)
	}
	if err := sameHistory(log, 3, other); err == nil {
		t.Error("another history is accepted")
	}
}
