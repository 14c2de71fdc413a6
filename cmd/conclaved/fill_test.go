package main

import (
	"context"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"path/filepath"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// peers answer as other nodes do.
type peers struct {
	st    *state.State
	logs  map[string]func(leaf uint64) ([]byte, error)
	asked map[string]int
}

func (p peers) State() *state.State { return p.st }

func (p peers) FetchRecords(_ context.Context, peer string, leaf uint64) ([]byte, error) {
	p.asked[peer]++
	if f := p.logs[peer]; f != nil {
		return f(leaf)
	}
	return nil, kms.Errorf(kms.Unavailable, "node %s is down", peer)
}

func commands(t *testing.T, dir string, to uint64) *audit.ClusterLog {
	t.Helper()
	log, err := audit.OpenClusterLog(filepath.Join(t.TempDir(), dir))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	for i := uint64(1); i <= to; i++ {
		raw := fmt.Appendf(nil, "command %d", i)
		sum := sha256.Sum256(raw)
		if err := log.Append(i, raw, canon.Marshal(state.Leaf{Index: i, Command: sum[:]})); err != nil {
			t.Fatal(err)
		}
	}
	return log
}

// TestFiller fetches a gap where one node is down, one lies, and one has it all.
func TestFiller(t *testing.T) {
	w := statetest.New(t, statetest.Options{})
	whole := commands(t, "whole", 500)
	root, _ := whole.Root()
	gappy := commands(t, "gappy", 100)
	if err := gappy.Restored(500, 500, root); err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, m := range w.State().Members() {
		ids = append(ids, m.ID)
	}
	if len(ids) < 3 {
		t.Fatalf("%d members", len(ids))
	}
	p := peers{st: w.State(), asked: map[string]int{}, logs: map[string]func(uint64) ([]byte, error){
		ids[1]: func(uint64) ([]byte, error) { return []byte("no records"), nil },
	}}
	f := filler{node: ids[0], log: slog.New(slog.DiscardHandler), own: gappy, others: p}
	f.fill(t.Context())
	if _, n := gappy.Missing(); n != 400 {
		t.Errorf("%d leaves are missing", n)
	}
	p.logs[ids[2]] = whole.Pack
	f.fill(t.Context())
	f.fill(t.Context())
	if got, ok := gappy.Root(); !ok || string(got) != string(root) {
		t.Errorf("root %x, want %x", got, root)
	}
	if p.asked[ids[0]] != 0 || p.asked[ids[1]] != 2 {
		t.Errorf("asked %v", p.asked)
	}
}
