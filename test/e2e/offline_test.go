package e2e

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/test/harness"
)

// signed is the field that conclave proposal show and conclave evidence verify print of
// what custodians sign.
type signed struct {
	Signed json.RawMessage `json:"signed"`
}

// TestOfflineApproval approves a rotation by files alone: the custodians' computers have
// no address, no certificate and no home. What the proposal showed is what the evidence
// holds.
func TestOfflineApproval(t *testing.T) {
	s := site{t, cluster(t)}
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	person := s.c.Env("fr").With("CONCLAVE_MEMORY", at("memory"))
	conclave := func(env harness.Env, args ...string) harness.Result {
		t.Helper()
		r, err := s.c.CLI(t.Context(), env, args...)
		if err = errors.Join(err, r.Err()); err != nil {
			t.Fatal(err)
		}
		return r
	}
	name := unique("offline")
	s.key("coalition", name, kms.Encrypt, "")
	p := s.propose(kms.ActionRotate, "coalition", name)
	conclave(person, "proposal", "export", p.ID, "--out", at("exported"))
	var shown signed
	if err := conclave(person, "proposal", "show", p.ID, "-o", "json").JSON(&shown); err != nil {
		t.Fatal(err)
	}

	from := "exported"
	for _, who := range []string{"fr-1", "de-1"} {
		key, pass := s.c.CustodianFiles(who)
		r := conclave(harness.Env{}, "sign", "--offline", at(from), "--out", at(who), "--approve", "--custodian-key", key, "--pass-file", pass, "--yes", "-o", "json")
		var alone signed
		if err := r.JSON(&alone); err != nil || !bytes.Equal(alone.Signed, shown.Signed) {
			t.Errorf("%s was shown\n%s\nand not\n%s (%v)", who, alone.Signed, shown.Signed, err)
		}
		from = who
	}

	// What was changed on the way does not count.
	b, err := os.ReadFile(at("de-1"))
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-1] ^= 1 // the last byte of a signature
	if err := os.WriteFile(at("altered"), b, 0o600); err != nil {
		t.Fatal(err)
	}
	r, err := s.c.CLI(t.Context(), person, "proposal", "submit", at("altered"))
	if err != nil || r.Code == 0 {
		t.Errorf("an altered file: %v, exit code %d, %s", err, r.Code, r.Stderr)
	}

	conclave(person, "proposal", "submit", at("de-1"))
	conclave(person, "proposal", "submit", at("de-1")) // again, which changes nothing
	for _, n := range s.c.All() {
		if _, err := s.c.Activated(t.Context(), n.Site, "coalition", name, 2); err != nil {
			t.Error(err)
		}
	}
	conclave(person, "evidence", "get", p.ID, "--out", at("evidence"))
	var proven signed
	r = conclave(harness.Env{}, "evidence", "verify", at("evidence"), "--cluster", s.c.Vars["CONCLAVE_CLUSTER"], "-o", "json")
	if err := r.JSON(&proven); err != nil || !bytes.Equal(proven.Signed, shown.Signed) {
		t.Errorf("the evidence holds\n%s\nthe proposal showed\n%s (%v)", proven.Signed, shown.Signed, err)
	}
	if m := conclave(person, "memory", "show", "-o", "json"); !strings.Contains(m.Stdout, p.ID) {
		t.Errorf("what was brought to the cluster is not remembered: %s", m.Stdout)
	}
}
