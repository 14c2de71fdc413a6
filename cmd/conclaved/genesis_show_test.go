package main

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/engine"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/pqc"
)

// TestGenesisShowHidesNothing checks that whoever signs the document sees whose
// CAs, keys and access rules it sets, and nothing that only looks like them.
func TestGenesisShowHidesNothing(t *testing.T) {
	evil := "permit (principal, action, resource);\x1b[1A\x1b[2Kaccess, the default\u202e\n"
	w := statetest.New(t, statetest.Options{Access: []byte(evil)})
	g := w.Genesis()
	var out bytes.Buffer
	showGenesis(&out, w.Signed(), g)
	s := out.String()
	want := []string{"signed    by all 3 nodes", "not the default of this release", `permit (principal, action, resource);\x1b[1A`}
	for _, site := range g.Sites {
		want = append(want, fmt.Sprintf("SHA-256 %x", sha256.Sum256(site.CAs[0])))
	}
	for _, n := range g.Nodes {
		want = append(want, pqc.Fingerprint(n.Signing), pqc.Fingerprint(n.Agreement), n.Address, n.API, "voter")
	}
	for _, x := range want {
		if !strings.Contains(s, x) {
			t.Errorf("not shown: %s", x)
		}
	}
	if strings.ContainsAny(s, "\x1b\u202e") {
		t.Errorf("control characters reach the terminal: %q", s)
	}
	out.Reset()
	g.Access = []byte(engine.DefaultAccess())
	showGenesis(&out, w.Signed(), g)
	if !strings.Contains(out.String(), ", the default of this release\n") {
		t.Error("the default is not named")
	}
}

// TestGenesisSignRefusesAnotherDocument: what was read is what is signed.
func TestGenesisSignRefusesAnotherDocument(t *testing.T) {
	w := statetest.New(t, statetest.Options{})
	dir := t.TempDir()
	file := filepath.Join(dir, "genesis.cbor")
	if err := os.WriteFile(file, w.Signed().Marshal(), 0o600); err != nil {
		t.Fatal(err)
	}
	refused(t, []string{"genesis", "sign", "--cluster", strings.Repeat("0", 32), file}, kms.ClusterID(w.Signed().Genesis), "genesis show")
}
