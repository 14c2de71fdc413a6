package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/hsm/hsmtest"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/pqc"
)

// TestTokenCredential makes a custodian's key in a SoftHSM token that wants the PIN for
// each signature, has it enrolled, and signs a proposal with it offline; the cluster's
// state takes the approval.
func TestTokenCredential(t *testing.T) {
	noEnvironment(t)
	tok := hsmtest.New(t)
	t.Setenv("SOFTHSM2_CONF", tok.ConfFile)
	path, query, _ := strings.Cut(tok.URI, "?")
	uri := path + ";object=fr-9;id=%09?" + query
	dir := t.TempDir()
	public := filepath.Join(dir, "fr-9.pub")
	run := func(code int, says string, args ...string) string {
		t.Helper()
		out, _, err := cli(t, "", args...)
		if exitCode(err) != code && !(code == 0 && err == nil) || err != nil && !strings.Contains(err.Error(), says) {
			t.Fatalf("conclave %s: %v, exit code %d, wanted %d and %q", strings.Join(args, " "), err, exitCode(err), code, says)
		}
		return out
	}
	with := func(args ...string) []string { return append(args, "--credential", uri, "--pin-file", tok.PINFile) }
	run(4, "no EC private key", with("custodian", "token", "probe")...)
	run(2, "no terminal", "custodian", "token", "probe", "--credential", uri)
	run(2, "pin-value is refused", "custodian", "token", "probe", "--credential", uri+"&pin-value=1", "--pin-file", tok.PINFile)
	run(2, "--curve", with("custodian", "token", "generate", "--out", public, "--curve", "P-521")...)
	run(0, "", with("custodian", "token", "generate", "--out", public, "--curve", "P-256", "--pin-each-use")...)
	run(5, "exists already", with("custodian", "token", "generate", "--out", public)...)
	var info tokenInfo
	if err := json.Unmarshal([]byte(run(0, "", with("custodian", "token", "probe", "-o", "json")...)), &info); err != nil {
		t.Fatal(err)
	}
	if !info.AlwaysAuthenticate || !info.NeverExtractable || !info.Local || info.Label != "fr-9" || info.ID != "09" || info.Suite != pqc.ECDSAP256SHA256.String() {
		t.Errorf("%+v", info)
	}

	k, _, err := readKey(public, "fr-9")
	if err != nil || k.ID != info.Fingerprint || k.Suite != uint16(pqc.ECDSAP256SHA256) {
		t.Fatalf("%v: %+v", err, k)
	}
	w := statetest.New(t, statetest.Options{})
	w.Carry(kms.ActionCustodian, "custodian/fr-9", approval.CustodianParams{Custodian: approval.Custodian{
		ID: "fr-9", Site: "fr", Credentials: []approval.Credential{{ID: k.ID, Suite: k.Suite, PublicKey: k.PublicKey}}}})
	w.CreateKeyring("coalition", "de", "fr", "jp")
	w.CreateKey("coalition", "orders", kms.Encrypt)
	id := w.Propose(kms.ActionRotate, "key/coalition/orders", nil)
	p, _ := w.State().Proposal(id)
	file := filepath.Join(dir, "proposal")
	write(t, file, approval.Carry(w.State().Cluster(), p.Bytes, w.State().Custodians()).Marshal())
	run(2, "either --custodian-key or --credential", with("sign", "--offline", file, "--approve", "--yes", "--custodian-key", "x")...)
	wrong := filepath.Join(dir, "wrong")
	write(t, wrong, []byte("no-such-pin"))
	run(6, "PIN refused", "sign", "--offline", file, "--approve", "--yes", "--credential", uri, "--pin-file", wrong)
	run(0, "", with("sign", "--offline", file, "--approve", "--yes")...)
	c, _, err := readCarried(file)
	if err != nil || len(c.Statements) != 1 || c.Statements[0].Custodian != "fr-9" {
		t.Fatalf("%v: %+v", err, c.Statements)
	}
	record, _ := w.State().Custodian("fr-9")
	if err := c.Statements[0].Verify(record, p.Bytes); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(file); err != nil || strings.Contains(string(b), "pin") {
		t.Errorf("%v, or the file shows a PIN", err)
	}
}
