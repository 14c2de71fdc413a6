package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms/attest"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

// addTPM gives the founding a third site, jp, whose node is on a software TPM.
func (f *founding) addTPM() {
	f.t.Helper()
	soft := tpmtest.New(f.t)
	cfg := soft.Config()
	if err := os.Mkdir(f.path("jp"), 0o700); err != nil {
		f.t.Fatal(err)
	}
	f.write(fmt.Sprintf(`node = "jp-1"
site = "jp"
data_dir = "data"
genesis = "../genesis.cbor"
[tls]
certificate = "node.crt"
key = "node.key"
[cluster]
listen = "127.0.0.1:0"
advertise = "jp.example:7600"
[api]
listen = "127.0.0.1:0"
advertise = "https://jp.example:7700"
[device]
type = "tpm"
path = %q
auth_file = %q
ek_chain = "chain.pem"
`, cfg.Path, cfg.AuthFile), "jp", "conclaved.toml")
	for name, from := range map[string]string{"vendor.pem": "swtpm-localca-rootca-cert.pem", "chain.pem": "issuercert.pem"} {
		b, err := os.ReadFile(filepath.Join(soft.Dir(), "ca", from))
		if err != nil {
			f.t.Fatal(err)
		}
		f.write(string(b), "jp", name)
	}
	if _, err := newAuthority("jp.example", f.path("jp", "ca.pem"), f.path("jp", "ca.key")); err != nil {
		f.t.Fatal(err)
	}
}

func (f *founding) card(site string) card {
	f.t.Helper()
	c, err := readCard(f.path(site, "data", "node.json"))
	if err != nil {
		f.t.Fatal(err)
	}
	return c
}

func (f *founding) writeJSON(v any, parts ...string) {
	f.t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		f.t.Fatal(err)
	}
	f.write(string(b), parts...)
}

// TestAttest goes the way of two sites' operators from cards to a genesis document
// that says what is proven of a node's TPM.
func TestAttest(t *testing.T) {
	f := newFounding(t)
	f.addTPM()
	f.write(f.read("fr", "conclaved.toml")+"vendor_attestation = \"vendor.bin\"\n", "fr", "conclaved.toml")
	refused(t, []string{"init", "-c", f.config("fr")}, "device.vendor_attestation", "vendor.bin")
	f.write("what the vendor signed", "fr", "vendor.bin")
	if err := os.Rename(f.path("jp", "chain.pem"), f.path("away")); err != nil {
		t.Fatal(err)
	}
	refused(t, []string{"init", "-c", f.config("jp")}, "device.ek_chain", "chain.pem")
	if err := os.Rename(f.path("away"), f.path("jp", "chain.pem")); err != nil {
		t.Fatal(err)
	}
	for _, site := range []string{"fr", "de", "jp"} {
		accepted(t, "init", "-c", f.config(site))
	}
	f.cards()
	f.challenges()
	f.answers()
	f.witnesses()
	f.plans()
	f.nextRoot()
}

// cards holds that cards carry the attestation that fits their device.
func (f *founding) cards() {
	t := f.t
	t.Helper()
	for site, kind := range map[string]string{"fr": attest.KindPKCS11, "de": attest.KindPKCS11, "jp": attest.KindTPM} {
		c := f.card(site)
		d, err := attest.Parse(c.Attestation)
		if err != nil || d.Kind != kind || c.ImportKind == "" || len(c.Import) == 0 {
			t.Fatalf("%s: %q, %q, %v", site, d.Kind, c.ImportKind, err)
		}
		switch {
		case site == "jp" && (d.TPM.Witness != nil || len(d.TPM.EKChain) != 1 || len(d.TPM.EKCertificate) == 0):
			t.Errorf("jp: %+v", d.TPM)
		case site == "fr" && string(d.PKCS11.Vendor) != "what the vendor signed", site == "de" && len(d.PKCS11.Vendor) != 0:
			t.Errorf("%s: vendor attestation %q", site, d.PKCS11.Vendor)
		case kind == attest.KindPKCS11 && len(d.PKCS11.Keys) != 3:
			t.Errorf("%s: %+v", site, d.PKCS11)
		}
	}
}

func (f *founding) challenges() {
	t := f.t
	t.Helper()
	try := func(site, card string, words ...string) {
		t.Helper()
		refused(t, []string{"attest", "challenge", "-c", f.config(site), "--card", card, "-o", f.path("refused.json")}, words...)
	}
	jp := f.path("jp", "data", "node.json")
	try("jp", jp, "your own site jp")
	try("fr", f.path("de", "data", "node.json"), "not on a TPM")
	try("fr", f.path("none.json"), "none.json")
	refused(t, []string{"attest", "challenge", "-c", f.config("fr"), "-o", "x"}, "--card")
	refused(t, []string{"attest", "challenge", "-c", f.config("fr"), "--card", jp, "-o", f.config("fr")}, "exists already")
	for name, change := range map[string]func(*card){
		"no attestation":  func(c *card) { c.Attestation = nil },
		"another node":    func(c *card) { c.Node = "jp-2" },
		"another key":     func(c *card) { c.Signing = f.card("de").Signing; c.SigningSuite = f.card("de").SigningSuite },
		"an altered one":  func(c *card) { c.Attestation[len(c.Attestation)-5] ^= 1 },
		"a foreign suite": func(c *card) { c.SigningSuite = "none" },
	} {
		c := f.card("jp")
		change(&c)
		f.writeJSON(c, "bad.json")
		if out, err := program(t, "attest", "challenge", "-c", f.config("fr"), "--card", f.path("bad.json"), "-o", f.path("refused.json")); err == nil {
			t.Errorf("%s: %s", name, out)
		}
	}
	if _, err := os.Stat(f.path("refused.json")); err == nil {
		t.Error("a refused challenge was written")
	}
	if list, err := os.ReadDir(f.path("fr", "data", "attest")); err == nil && len(list) > 0 {
		t.Errorf("refused challenges were kept: %v", list)
	}
	out := accepted(t, "attest", "challenge", "-c", f.config("fr"), "--card", jp, "-o", f.path("challenge.json"))
	if !strings.Contains(out, "jp-1, site jp, signing key SHA256:") {
		t.Error(out)
	}
	for _, e := range entries(t, f.path("fr", "data", "attest")) {
		if info, err := os.Stat(f.path("fr", "data", "attest", e)); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%v, %v", info, err)
		}
	}
}

func (f *founding) answers() {
	t := f.t
	t.Helper()
	try := func(site, challenge string, words ...string) {
		t.Helper()
		refused(t, []string{"attest", "answer", "-c", f.config(site), "--challenge", challenge, "-o", f.path("refused.json")}, words...)
	}
	try("fr", f.path("challenge.json"), "for node jp-1", "this is node fr-1")
	try("jp", f.path("jp", "data", "node.json"), "node.json")
	refused(t, []string{"attest", "answer", "-c", f.config("jp"), "--next", "--challenge", f.path("challenge.json"), "-o", f.path("refused.json")}, "no [next_device]")
	var good challengeFile
	if err := strictJSON([]byte(f.read("challenge.json")), &good); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*challengeFile){
		"format":     func(c *challengeFile) { c.Format = 2 },
		"credential": func(c *challengeFile) { c.Credential = bytes.Clone(c.Credential); c.Credential[9] ^= 1 },
		"secret":     func(c *challengeFile) { c.Secret = bytes.Clone(c.Secret); c.Secret[9] ^= 1 },
		"node":       func(c *challengeFile) { c.Node = "jp-2" },
	} {
		c := good
		change(&c)
		f.writeJSON(c, "bad.json")
		if out, err := program(t, "attest", "answer", "-c", f.config("jp"), "--challenge", f.path("bad.json"), "-o", f.path("refused.json")); err == nil {
			t.Errorf("%s: %s", name, out)
		}
	}
	stale := f.card("jp")
	stale.Signing = f.card("de").Signing
	f.writeJSON(stale, "bad.json")
	refused(t, []string{"attest", "answer", "-c", f.config("jp"), "--card", f.path("bad.json"), "--challenge", f.path("challenge.json"), "-o", f.path("refused.json")}, "another signing key")
	accepted(t, "attest", "answer", "-c", f.config("jp"), "--challenge", f.path("challenge.json"), "-o", f.path("answer.json"))
}

func (f *founding) witnesses() {
	t := f.t
	t.Helper()
	var good answerFile
	if err := strictJSON([]byte(f.read("answer.json")), &good); err != nil {
		t.Fatal(err)
	}
	try := func(site string, a answerFile, words ...string) {
		t.Helper()
		f.writeJSON(a, "bad.json")
		refused(t, []string{"attest", "witness", "-c", f.config(site), "--answer", f.path("bad.json"), "-o", f.path("refused.json")}, words...)
	}
	try("de", good, "no open challenge")
	bad := good
	bad.Answer = bytes.Clone(good.Answer)
	bad.Answer[0] ^= 1
	try("fr", bad, "the answer is wrong")
	bad = good
	bad.Node = "jp-2"
	try("fr", bad, "the answer is wrong")
	bad = good
	bad.Answer = nil
	try("fr", bad, "the answer is wrong")
	bad = good
	bad.ID = "../../node"
	try("fr", bad, "names no challenge")
	bad.ID = strings.ToUpper(good.ID)
	if bad.ID != good.ID {
		try("fr", bad, "names no challenge")
	}
	f.alteredChallenge(good)
	out := accepted(t, "attest", "witness", "-c", f.config("fr"), "--answer", f.path("answer.json"), "-o", f.path("witness.json"))
	if !strings.Contains(out, "fr-1 has witnessed the TPM of jp-1") {
		t.Error(out)
	}
	try("fr", good, "no open challenge", "answered before")
	if left := entries(t, f.path("fr", "data", "attest")); len(left) != 0 {
		t.Errorf("kept: %v", left)
	}
}

// alteredChallenge holds that what the witness kept is what it signs.
func (f *founding) alteredChallenge(a answerFile) {
	t := f.t
	t.Helper()
	path := []string{"fr", "data", "attest", a.ID + ".json"}
	good := f.read(path...)
	var p pendingFile
	if err := strictJSON([]byte(good), &p); err != nil {
		t.Fatal(err)
	}
	p.Card.Node = "jp-9"
	f.writeJSON(p, path...)
	refused(t, []string{"attest", "witness", "-c", f.config("fr"), "--answer", f.path("answer.json"), "-o", f.path("refused.json")}, "unwrap the secret")
	f.write(good, path...)
}

// plans makes genesis documents with the witness's statement and shows them.
func (f *founding) plans() {
	t := f.t
	t.Helper()
	full := strings.Replace(plan, "[[custodian]]", `[[site]]
id = "jp"
trust_domain = "jp.example"
ca = "jp/ca.pem"
[[node]]
card = "jp/data/node.json"
voter = true
witness = "witness.json"
[[custodian]]`, 1)
	full = strings.Replace(full, "[[site]]", "vendors = [\"jp/vendor.pem\"]\n[[site]]", 1)
	full += `[[policy]]
name = "vault"
attested = true
  [[policy.rule]]
  actions = ["create", "rotate", "suspend", "resume", "deactivate", "compromise"]
  approvals = 1
  sites = 1
  lifetime = "72h"
  [[policy.rule]]
  actions = ["destroy"]
  approvals = 2
  sites = 2
  delay = "168h"
  lifetime = "336h"
`
	create := []string{"genesis", "create", "--plan", f.path("genesis.toml"), "--out", f.path("genesis.cbor")}
	for _, x := range []struct{ old, new, says string }{
		{`vendors = ["jp/vendor.pem"]`, `vendors = ["none.pem"]`, "vendors: "},
		{`vendors = ["jp/vendor.pem"]`, `vendors = ["jp/ca.key"]`, "holds no PEM certificate"},
		{`witness = "witness.json"`, `witness = "none.json"`, "witness: "},
		{`witness = "witness.json"`, `witness = "answer.json"`, "answer.json"},
		{`card = "jp/data/node.json"`, `card = "de/data/node.json"`, "is about node jp-1, not de-1"},
	} {
		f.write(strings.Replace(full, x.old, x.new, 1), "genesis.toml")
		refused(t, create, x.says)
	}
	var w witnessFile
	if err := strictJSON([]byte(f.read("witness.json")), &w); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*witnessFile){
		"another witness": func(w *witnessFile) { w.Witness = "de-1" },
		"itself":          func(w *witnessFile) { w.Witness = "jp-1" },
		"a signature":     func(w *witnessFile) { w.Signature = bytes.Clone(w.Signature); w.Signature[3] ^= 1 },
	} {
		bad := w
		change(&bad)
		f.writeJSON(bad, "bad.json")
		f.write(strings.Replace(full, `"witness.json"`, `"bad.json"`, 1), "genesis.toml")
		if out, err := program(t, create...); err == nil {
			t.Errorf("%s: %s", name, out)
		}
	}
	f.write(full, "genesis.toml")
	accepted(t, create...)
	f.shows("node      jp-1  hardware attested", "node      jp-1  proven: ", "node fr-1 of site fr challenged it", "vendor    SHA-256", "swtpm-localca-rootca",
		"node      fr-1  hardware NOT attested", "node      fr-1  only claimed: the vendor's attestation, 22 bytes", "node      de-1  only claimed: of its signing key", "policy    vault  keyrings under it: only on nodes")

	// Founders who do not trust the vendor, or have no witness, are told so.
	for _, cut := range []string{`vendors = ["jp/vendor.pem"]`, `witness = "witness.json"`} {
		if err := os.Remove(f.path("genesis.cbor")); err != nil {
			t.Fatal(err)
		}
		f.write(strings.Replace(full, cut, "", 1), "genesis.toml")
		accepted(t, create...)
		f.shows("node      jp-1  hardware NOT attested", "could be software")
	}
}

// nextRoot has another TPM, which is to take the place of jp's, witnessed by de.
func (f *founding) nextRoot() {
	t := f.t
	t.Helper()
	soft := tpmtest.New(t)
	cfg := soft.Config()
	config := f.read("jp", "conclaved.toml")
	f.write(config+fmt.Sprintf("[next_device]\ntype = \"tpm\"\npath = %q\nauth_file = %q\n", cfg.Path, cfg.AuthFile), "jp", "conclaved.toml")
	defer f.write(config, "jp", "conclaved.toml")
	accepted(t, "rekey", "prepare", "-c", f.config("jp"))
	next := f.path("jp", "data", "next-node.json")
	accepted(t, "attest", "challenge", "-c", f.config("de"), "--card", next, "-o", f.path("challenge2.json"))
	answer := []string{"attest", "answer", "-c", f.config("jp"), "--challenge", f.path("challenge2.json"), "-o", f.path("answer2.json")}
	refused(t, answer, "challenge2.json")
	refused(t, append(answer, "--card", next), "another signing key")
	accepted(t, append(answer, "--next")...)
	accepted(t, "attest", "witness", "-c", f.config("de"), "--answer", f.path("answer2.json"), "-o", f.path("witness2.json"))
	refused(t, []string{"rekey", "prepare", "-c", f.config("jp"), "--witness", f.path("answer2.json")}, "answer2.json")
	accepted(t, "rekey", "prepare", "-c", f.config("jp"), "--witness", f.path("witness2.json"))

	c, err := readCard(next)
	if err != nil {
		t.Fatal(err)
	}
	subject, err := c.subject()
	if err != nil {
		t.Fatal(err)
	}
	by, err := f.card("de").subject()
	if err != nil {
		t.Fatal(err)
	}
	r, err := attest.Verify(c.Attestation, subject, attest.Context{
		Time: time.Now(), Vendors: [][]byte{soft.EndorsementRoot()}, Witness: func(id string) (attest.Subject, bool) { return by, id == "de-1" },
	})
	if err != nil || !r.Attested {
		t.Errorf("%+v, %v", r, err)
	}
}
