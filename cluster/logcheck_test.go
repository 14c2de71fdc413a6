package cluster

import (
	"bytes"
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

// Keys out of order are found in pages of both kinds, before bbolt looks for free pages.
func TestCheckPagesOrder(t *testing.T) {
	path := filepath.Join(t.TempDir(), logFile)
	store, err := openBolt(path)
	if err != nil {
		t.Fatal(err)
	}
	var logs []*raft.Log
	for i := range uint64(1000) {
		logs = append(logs, &raft.Log{Index: i + 1, Data: make([]byte, 100)})
	}
	if err := errors.Join(store.StoreLogs(logs), store.Close()); err != nil {
		t.Fatal(err)
	}
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := checkPages(bytes.NewReader(good)); err != nil {
		t.Fatalf("whole: %v", err)
	}
	found := map[uint16]int{}
	size := os.Getpagesize()
	for at := 2 * size; at+size <= len(good); at += size {
		kind, count := order.Uint16(good[at+8:]), order.Uint16(good[at+10:])
		key := func(b []byte, i int) []byte {
			e := at + pageHeader + i*elementSize
			pos := int(order.Uint32(b[e:]))
			if kind == pageLeaf {
				pos = int(order.Uint32(b[e+4:]))
			}
			return b[e+pos : e+pos+8]
		}
		if kind != pageBranch && kind != pageLeaf || count < 3 { // the root lists two names
			continue
		}
		for _, i := range []int{0, int(count) - 1} {
			bad := bytes.Clone(good)
			if i == 0 {
				copy(key(bad, 0), key(good, 1))
			} else {
				copy(key(bad, i), bytes.Repeat([]byte{0xFF}, 8)) // beyond what the page above says of it
			}
			if err := checkPages(bytes.NewReader(bad)); err != nil {
				if !strings.Contains(err.Error(), "out of order") {
					t.Fatal(err)
				}
				found[kind]++
			}
		}
	}
	if found[pageLeaf] < 20 || found[pageBranch] < 1 {
		t.Errorf("found %v", found)
	}
}

func wantError(t *testing.T, err error, text string) {
	t.Helper()
	var e *kms.Error
	if !errors.As(err, &e) || !strings.Contains(e.Msg, text) || e.Fix == "" {
		t.Errorf("got %v, want %q and a next step", err, text)
	}
}
