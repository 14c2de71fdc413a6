package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms/state"
)

// A node that joined later is not in the genesis document. Its card says that it is to
// join, or its data directory, also one that conclaved recover has built, that it has.
func TestCheckGenesisOfALaterMember(t *testing.T) {
	n := &node{cfg: Config{Node: "fr-2", Site: "fr", DataDir: t.TempDir()}}
	g := state.Genesis{}
	if err := n.checkGenesis(g); err == nil || !strings.Contains(err.Error(), "conclaved join") {
		t.Errorf("a node that nobody knows: %v", err)
	}
	raft := filepath.Join(n.cfg.DataDir, "raft")
	if err := os.Mkdir(raft, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := n.checkGenesis(g); err == nil {
		t.Error("an empty directory makes a member")
	}
	if err := os.WriteFile(filepath.Join(raft, "identity.json"), []byte("{}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := n.checkGenesis(g); err != nil {
		t.Errorf("a directory that was restored: %v", err)
	}
}

func TestRootFileOfOthers(t *testing.T) {
	path := filepath.Join(t.TempDir(), "root.json")
	f := rootFile{Format: 1, Suite: "MLKEM1024-P384", Wrapped: []byte{1}, Root: firstRoot, Signing: "SHA256:x"}
	if err := os.WriteFile(path, f.bytes(), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readRoot(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o640); err != nil {
		t.Fatal(err)
	}
	if _, err := readRoot(path); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a root file that others can read: %v", err)
	}
}
