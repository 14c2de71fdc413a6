package cluster

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"

	"github.com/conclave-kms/conclave/kms"
)

// A log whose pages are damaged is an error that names the file, wherever the
// damage is, and never a panic; one in use by another process is said to be that.
func TestCheckStore(t *testing.T) {
	path := filepath.Join(t.TempDir(), logFile)
	if err := checkStore(path); err != nil {
		t.Errorf("no file yet: %v", err)
	}
	store, err := raftboltdb.New(raftboltdb.Options{Path: path, BoltOptions: &bbolt.Options{NoFreelistSync: true}})
	if err != nil {
		t.Fatal(err)
	}
	for i := range uint64(200) {
		if err := store.StoreLog(&raft.Log{Index: i + 1, Data: make([]byte, 500)}); err != nil {
			t.Fatal(err)
		}
	}
	wantError(t, checkStore(path), "in use by another process")
	if err := store.Close(); err != nil {
		t.Fatal(err)
	}
	if err := checkStore(path); err != nil {
		t.Fatalf("whole: %v", err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	page := os.Getpagesize()
	for at := 2 * page; at+page <= len(good); at += page { // the flags of each page's header; the first two pages stand in for each other
		bad := append([]byte{}, good...)
		bad[at+8] ^= 0x55
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := checkStore(path); err != nil { // pages that are free may hold anything
			wantError(t, err, path)
			found++
		}
	}
	if found == 0 {
		t.Error("no damage was found")
	}
}

func wantError(t *testing.T, err error, text string) {
	t.Helper()
	var e *kms.Error
	if !errors.As(err, &e) || !strings.Contains(e.Msg, text) || e.Fix == "" {
		t.Errorf("got %v, want %q and a next step", err, text)
	}
}
