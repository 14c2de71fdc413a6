package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/hsm/hsmtest"
	"github.com/conclave-kms/conclave/pqc"
)

// program runs a command of conclaved in this process.
func program(t testing.TB, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	root := rootCommand()
	root.SetArgs(args)
	root.SetOut(&out)
	root.SetErr(&out)
	err := root.ExecuteContext(t.Context())
	return out.String(), err
}

// refused runs a command that must fail and say all of the words.
func refused(t testing.TB, args []string, words ...string) {
	t.Helper()
	out, err := program(t, args...)
	if err == nil {
		t.Errorf("%v succeeded: %s", args, out)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%v: %q does not say %q", args, err, w)
		}
	}
}

func accepted(t testing.TB, args ...string) string {
	t.Helper()
	out, err := program(t, args...)
	if err != nil {
		t.Fatalf("%v: %v", args, err)
	}
	return out
}

// founding is a directory in which two sites with SoftHSM tokens found a cluster.
type founding struct {
	t      testing.TB
	dir    string
	tokens map[string]*hsmtest.Token
}

func newFounding(t testing.TB) *founding {
	t.Helper()
	f := &founding{t: t, dir: t.TempDir(), tokens: map[string]*hsmtest.Token{}}
	for _, site := range []string{"fr", "de"} {
		f.tokens[site] = hsmtest.New(t)
		if err := os.Mkdir(f.path(site), 0o700); err != nil {
			t.Fatal(err)
		}
		f.configure(site, site+"-1", site, "data")
		ca, err := newAuthority(site+".example", f.path(site, "ca.pem"), f.path(site, "ca.key"))
		if err != nil {
			t.Fatal(err)
		}
		if err := ca.issue("spiffe://"+site+".example/node/"+site+"-1", true, f.path(site, "node.crt"), f.path(site, "node.key")); err != nil {
			t.Fatal(err)
		}
		key, err := pqc.GenerateHybrid(nil)
		if err != nil {
			t.Fatal(err)
		}
		public, err := pqc.MarshalPublic(pqc.MLDSA65Ed25519, key.PublicKey())
		if err != nil {
			t.Fatal(err)
		}
		key.Destroy()
		f.write(string(public), site, "custodian.pub")
	}
	return f
}

func (f *founding) path(parts ...string) string {
	return filepath.Join(append([]string{f.dir}, parts...)...)
}

func (f *founding) write(text string, parts ...string) {
	f.t.Helper()
	if err := os.WriteFile(f.path(parts...), []byte(text), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

// configure writes site's configuration: which node it is, whose token it uses
// and where its data is.
func (f *founding) configure(site, node, token, data string) {
	tok := f.tokens[token]
	f.write(fmt.Sprintf(`node = %q
site = %q
data_dir = %q
genesis = "../genesis.cbor"
[tls]
certificate = "node.crt"
key = "node.key"
[cluster]
listen = "127.0.0.1:0"
advertise = "%s.example:7600"
heartbeat = "1s"
[api]
listen = "127.0.0.1:0"
advertise = "https://%s.example:7700"
[device]
type = "pkcs11"
curve = "P-256"
uri = "%s&pin-source=file:%s"
softhsm_conf = %q
`, node, site, data, site, site, tok.URI, tok.PINFile, tok.ConfFile), site, "conclaved.toml")
}

func (f *founding) config(site string) string { return f.path(site, "conclaved.toml") }

const plan = `name = "two sites"
[[site]]
id = "fr"
trust_domain = "fr.example"
ca = "fr/ca.pem"
[[site]]
id = "de"
trust_domain = "de.example"
ca = "de/ca.pem"
[[node]]
card = "fr/data/node.json"
voter = true
[[node]]
card = "de/data/node.json"
voter = true
[[custodian]]
id = "fr-a"
site = "fr"
keys = ["fr/custodian.pub"]
[[custodian]]
id = "de-a"
site = "de"
keys = ["de/custodian.pub"]
[[policy]]
name = "governance"
  [[policy.rule]]
  actions = ["keyring"]
  direct = ["operator"]
  [[policy.rule]]
  actions = ["policy", "custodian", "node", "recover"]
  approvals = 2
  sites = 2
  lifetime = "72h"
`

const recoveryTable = `[[recovery]]
name = "paris"
residency = ["fr"]
custodians = ["fr-a", "de-a"]
threshold = 2
sites = 2
`

// TestFounding goes the way of two sites' operators, from tokens to a signed
// genesis document, and leaves it at every step where they could.
func TestFounding(t *testing.T) {
	f := newFounding(t)
	document := f.path("genesis.cbor")
	refused(t, []string{"run", "-c", f.config("fr")}, "conclaved init")
	f.initialise()

	refused(t, []string{"run", "-c", f.config("fr")}, document, "is missing", "conclaved genesis create")
	refused(t, []string{"genesis", "sign", "-c", f.config("fr"), document}, "is missing")
	f.refusePlans()
	f.write(plan, "genesis.toml")
	out := accepted(t, "genesis", "create", "--plan", f.path("genesis.toml"), "--out", document)
	if !strings.Contains(out, "to be signed by 2 nodes") || !strings.Contains(out, "no recovery key is planned") {
		t.Errorf("%s", out)
	}
	refused(t, []string{"genesis", "create", "--plan", f.path("genesis.toml"), "--out", document}, "exists already")

	f.shows("NOT complete", "missing   de-1, fr-1", "two sites", "site      de", "node      fr-1", "custodian de-a", `"approvals":2`)
	refused(t, []string{"run", "-c", f.config("fr")}, document, "de-1")
	accepted(t, "genesis", "sign", "-c", f.config("fr"), document)
	f.shows("NOT complete", "missing   de-1\n")
	refused(t, []string{"run", "-c", f.config("fr")}, document, "de-1")
	accepted(t, "genesis", "sign", "-c", f.config("de"), document)
	accepted(t, "genesis", "sign", "-c", f.config("fr"), document) // again
	f.shows("signed    by all 2 nodes")

	f.refuseForeignRoots(document)
	f.refuseStarts()
	f.refuseTamperedDocument(document)
}

// TestPlannedRecoveryKey: what is to be done first when the cluster runs is checked with the
// plan and said.
func TestPlannedRecoveryKey(t *testing.T) {
	g := genesisPlan{Recovery: []recoveryPlan{{Name: "paris", Residency: []string{"fr"}, Custodians: []string{"fr-a", "de-a"}, Threshold: 2, Sites: 2}}}
	var b strings.Builder
	g.firstActs(&b)
	for _, line := range []string{
		"conclave recovery card --custodian de-a --custodian-key FILE --out de-a.card\n",
		"conclave recovery create paris --residency fr --threshold 2 --sites 2 --card fr-a.card --card de-a.card --reason ",
	} {
		if !strings.Contains(b.String(), line) {
			t.Errorf("%q is missing in\n%s", line, b.String())
		}
	}
}

// initialise makes both nodes' roots, one of them twice.
func (f *founding) initialise() {
	f.t.Helper()
	for _, site := range []string{"fr", "de"} {
		out := accepted(f.t, "init", "-c", f.config(site))
		if !strings.Contains(out, "  "+site+"-1, site "+site) || !strings.Contains(out, f.path(site, "data", "node.json")) {
			f.t.Errorf("init says %s", out)
		}
	}
	before := f.read("fr", "data", "node.json") + f.read("fr", "data", "root.json")
	accepted(f.t, "init", "-c", f.config("fr"))
	if f.read("fr", "data", "node.json")+f.read("fr", "data", "root.json") != before {
		f.t.Error("a second init changed the node")
	}
	if info, err := os.Stat(f.path("fr", "data", "root.json")); err != nil || info.Mode().Perm() != 0o600 {
		f.t.Errorf("root.json: %v, %v", info, err)
	}
}

func (f *founding) read(parts ...string) string {
	f.t.Helper()
	b, err := os.ReadFile(f.path(parts...))
	if err != nil {
		f.t.Fatal(err)
	}
	return string(b)
}

func (f *founding) shows(words ...string) {
	f.t.Helper()
	out := accepted(f.t, "genesis", "show", f.path("genesis.cbor"))
	for _, w := range words {
		if !strings.Contains(out, w) {
			f.t.Errorf("show does not say %q:\n%s", w, out)
		}
	}
}

// refusePlans holds that a plan with a mistake makes no document.
func (f *founding) refusePlans() {
	f.t.Helper()
	for _, x := range []struct{ old, new, says string }{
		{"voter = true", "voters = true", "genesis.toml:12:1: node.voters: no such field"},
		{"approvals = 2\n", "", "approvals"},
		{"sites = 2\n", "", "sites"},
		{"approvals = 2\n", "approvals = 3\n", "governance"},
		{`lifetime = "72h"`, `lifetime = 72`, "genesis.toml:"},
		{`lifetime = "72h"`, "lifetime = \"72h\"\n  delay = \"-1h\"", "not a positive duration"},
		{"fr/ca.pem", "fr/ca.key", "holds no PEM certificate"},
		{"fr/ca.pem", "fr/none.pem", "site fr: ca: "},
		{"fr/custodian.pub", "fr/ca.pem", "custodian fr-a: "},
		{"fr/data/node.json", "fr/data/root.json", "root.json"},
		{`id = "fr-a"`, `id = "de-a"`, "de-a"},
		{`name = "governance"`, `name = "other"`, "policy other"},
		{"fr.example", "de.example", "trust domain"},
		{"card = \"de/data/node.json\"\nvoter = true", "card = \"de/data/node.json\"", "site fr has 1 of 1 voters, a majority"},
		{`name = "two sites"`, "name = \"two sites\"\nmajority_site = \"fr\"", "has not (1 of 2)"},
		{`name = "two sites"`, "name = \"two sites\"\nmajority_site = \"jp\"", "does not exist"},
		{`, "recover"]`, `]`, "could never be brought back"},
		{"[[policy]]", strings.Replace(recoveryTable, "threshold = 2", "threshold = 3", 1) + "[[policy]]", "3 shares from 2 sites cannot be had of 2 custodians of 2 sites"},
		{"[[policy]]", strings.Replace(recoveryTable, "sites = 2", "sites = 1", 1) + "[[policy]]", "2 shares from 1 sites"},
		{"[[policy]]", recoveryTable + "[[policy]]", `has no rule for "recovery-key"`},
	} {
		if !strings.Contains(plan, x.old) {
			f.t.Fatalf("the plan has no %q", x.old)
		}
		f.write(strings.Replace(plan, x.old, x.new, 1), "genesis.toml")
		refused(f.t, []string{"genesis", "create", "--plan", f.path("genesis.toml"), "--out", f.path("genesis.cbor")}, x.says)
		if _, err := os.Stat(f.path("genesis.cbor")); err == nil {
			f.t.Fatalf("a plan with %q made a document", x.new)
		}
	}
}

// refuseForeignRoots holds that a root file belongs to one node, one device and
// one suite, as it was written.
func (f *founding) refuseForeignRoots(document string) {
	t := f.t
	t.Helper()
	sign := func(words ...string) {
		t.Helper()
		refused(t, []string{"genesis", "sign", "-c", f.config("fr"), document}, words...)
	}
	f.configure("fr", "fr-1", "de", "data") // the other token
	sign("root.json")
	f.configure("fr", "fr-2", "fr", "data")
	sign("root.json", "node fr-2")
	f.configure("fr", "de-1", "de", f.path("de", "data")) // all of de's under the name of fr's site
	if out, err := program(t, "run", "-c", f.config("fr")); err == nil || !strings.Contains(err.Error(), "site") {
		t.Errorf("%v: %s", err, out)
	}
	f.configure("fr", "fr-1", "fr", "data")

	good := f.read("fr", "data", "root.json")
	var root rootFile
	if err := json.Unmarshal([]byte(good), &root); err != nil {
		t.Fatal(err)
	}
	root.Wrapped[len(root.Wrapped)-1] ^= 1
	tampered, err := json.Marshal(root)
	if err != nil {
		t.Fatal(err)
	}
	for text, says := range map[string]string{
		string(tampered):   "unwrap the ML-KEM seed",
		"{}":               "format 0",
		"":                 "root.json is damaged",
		good + "{}":        "more than one JSON value",
		`{"format":1,"x":`: "root.json is damaged",
		strings.Replace(good, "MLKEM768-P256", "MLKEM1024-P384", 1): "MLKEM1024-P384",
		strings.Replace(good, `"suite"`, `"sweet"`, 1):              "sweet",
	} {
		if text == good {
			t.Fatal("the test changes nothing")
		}
		f.write(text, "fr", "data", "root.json")
		sign(says)
	}
	if err := os.Remove(f.path("fr", "data", "root.json")); err != nil {
		t.Fatal(err)
	}
	sign("conclaved init")
	f.write(good, "fr", "data", "root.json")
}

// refuseStarts holds that a node that cannot run says why.
func (f *founding) refuseStarts() {
	t := f.t
	t.Helper()
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	address := l.Addr().String()
	config := f.read("fr", "conclaved.toml")
	f.write(strings.Replace(config, "listen = \"127.0.0.1:0\"", "listen = \""+address+"\"", 1), "fr", "conclaved.toml")
	refused(t, []string{"run", "-c", f.config("fr")}, "cluster.listen", address, "in use")
	if _, err := listen(t.Context(), address, "api.listen"); err == nil || !strings.Contains(err.Error(), "api.listen: "+address+" is in use") {
		t.Errorf("%v", err)
	}
	if _, err := listen(t.Context(), "nowhere", "api.listen"); err == nil || !strings.HasPrefix(err.Error(), "api.listen: ") {
		t.Errorf("%v", err)
	}
	f.write(config, "fr", "conclaved.toml")

	if err := os.Rename(f.path("fr", "node.key"), f.path("fr", "away")); err != nil {
		t.Fatal(err)
	}
	refused(t, []string{"run", "-c", f.config("fr")}, "tls: ", "node.key")
	if err := os.Rename(f.path("fr", "away"), f.path("fr", "node.key")); err != nil {
		t.Fatal(err)
	}
	refused(t, []string{"run", "-c", f.path("none.toml")}, "none.toml")
}

// refuseTamperedDocument flips a byte in the signed document at many places.
func (f *founding) refuseTamperedDocument(document string) {
	t := f.t
	t.Helper()
	good := []byte(f.read("genesis.cbor"))
	for i := 0; i < len(good); i += 1 + len(good)/64 {
		bad := bytes.Clone(good)
		bad[i] ^= 1
		f.write(string(bad), "genesis.cbor")
		s, err := readSignedGenesis(document)
		if err == nil {
			_, err = s.Verify()
		}
		if err == nil {
			t.Fatalf("byte %d of %d can be changed", i, len(good))
		}
	}
	f.write("", "genesis.cbor")
	refused(t, []string{"run", "-c", f.config("fr")}, "genesis.cbor")
	refused(t, []string{"genesis", "show", document}, "genesis.cbor")
}

func TestWriteNewReplacesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	if err := writeNew(path, []byte("1"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeNew(path, []byte("2"), 0o600); err == nil || !strings.Contains(err.Error(), "exists already") {
		t.Error(err)
	}
	if err := replaceFile(path, []byte("3"), 0o640); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(path); string(b) != "3" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if err := writeNew(filepath.Join(t.TempDir(), "no", "x"), nil, 0o600); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}

func TestCardErrors(t *testing.T) {
	path := filepath.Join(t.TempDir(), "node.json")
	for text, says := range map[string]string{
		`{"format":2}`: "format 2", `{"format":1,"x":1}`: `"x"`, `[]`: "node.json", ``: "node.json",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := readCard(path); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v", text, err)
		}
	}
	if _, err := (card{Suite: "none"}).node(); err == nil {
		t.Error("an unknown suite was accepted")
	}
	if _, err := (card{Suite: "MLKEM768-P256", SigningSuite: "none"}).node(); err == nil {
		t.Error("an unknown signing suite was accepted")
	}
}
