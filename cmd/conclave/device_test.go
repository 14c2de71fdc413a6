package main

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/hsm/hsmtest"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

func writeText(t *testing.T, path, text string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func says(t *testing.T, text string, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("it does not say %q:\n%s", w, text)
		}
	}
}

func TestDeviceProbeToken(t *testing.T) {
	noEnvironment(t)
	tok := hsmtest.New(t)
	out, _, err := cli(t, "", "device", "probe", "--uri", tok.URI, "--softhsm-conf", tok.ConfFile, "--pin-file", tok.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	says(t, out, "SoftHSM", tok.Label, "not provisioned; conclaved init makes them", "protection hardware  yes", "root                 yes",
		"AES-KWP, PKCS#11 3.0", "attacks refused", "0x210a")

	// The configuration of a node, with another curve than the keys are on.
	tok.Provision(t, tok.Config())
	config := writeText(t, filepath.Join(t.TempDir(), "conclaved.toml"), fmt.Sprintf(
		"node = \"x\"\n[device]\ntype = \"pkcs11\"\nuri = \"%s&pin-source=file:%s\"\nsofthsm_conf = %q\n[next_device]\ntype = \"pkcs11\"\ncurve = \"P-256\"\nuri = \"%s&pin-source=file:%s\"\nsofthsm_conf = %q\n",
		tok.URI, tok.PINFile, tok.ConfFile, tok.URI, tok.PINFile, tok.ConfFile))
	out, _, err = cli(t, "", "device", "probe", "-c", config, "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var reports []probed
	if err := json.Unmarshal([]byte(out), &reports); err != nil || len(reports) != 1 || reports[0].TPM != nil || !reports[0].PKCS11.Keys.Provisioned {
		t.Errorf("%v: %s", err, out)
	}
	out, _, err = cli(t, "", "device", "probe", "-c", config, "--next")
	if err == nil || exitCode(err) != 1 || !strings.Contains(err.Error(), "another curve") {
		t.Errorf("keys on another curve: %v", err)
	}
	says(t, out, "NO, it cannot be a node's hardware root", "protection software  no: ")

	// Of two members one is not there: the other is shown all the same.
	group := writeText(t, filepath.Join(t.TempDir(), "group.toml"), fmt.Sprintf(
		"[device]\ntype = \"pkcs11\"\nisolate = true\nuris = [\"pkcs11:token=none?module-path=/none.so&pin-source=file:%s\", \"%s&pin-source=file:%s\"]\nsofthsm_confs = [\"\", %q]\n",
		tok.PINFile, tok.URI, tok.PINFile, tok.ConfFile))
	out, _, err = cli(t, "", "device", "probe", "-c", group)
	if err == nil || exitCode(err) != 1 || !strings.Contains(err.Error(), "member 1 of uris: ") || strings.Contains(err.Error(), "member 2") {
		t.Errorf("a group without its first member: %v", err)
	}
	says(t, out, tok.Label, "root                 yes")

	out, _, err = cli(t, "", "device", "bench", "-c", config, "--for", "10ms")
	if err != nil {
		t.Fatal(err)
	}
	says(t, out, "PER SECOND", "ECDH", "HMAC under an imported key", "load of an imported HMAC key")
}

func TestDeviceProbeTPM(t *testing.T) {
	noEnvironment(t)
	p := tpmtest.New(t)
	out, _, err := cli(t, "", "device", "probe", "--tpm", p.Config().Path)
	if err != nil {
		t.Fatal(err)
	}
	says(t, out, "SW TPM", "lockout", "endorsement", "certificate by", "PCR banks", "protection hardware  yes", "import, ECDSA P-384")
	out, _, err = cli(t, "", "device", "bench", "--tpm", p.Config().Path, "--for", "10ms", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	var rates []measured
	if err := json.Unmarshal([]byte(out), &rates); err != nil || len(rates) < 5 || rates[0].PerSecond <= 0 {
		t.Errorf("%v: %s", err, out)
	}
}

func TestDeviceUsage(t *testing.T) {
	noEnvironment(t)
	dir := t.TempDir()
	none := writeText(t, filepath.Join(dir, "none.toml"), "node = \"x\"\n")
	kind := writeText(t, filepath.Join(dir, "kind.toml"), "[device]\ntype = \"usb\"\n")
	noPIN := writeText(t, filepath.Join(dir, "pin.toml"), "[device]\ntype = \"pkcs11\"\nuri = \"pkcs11:token=x?module-path=/x.so\"\n")
	typo := writeText(t, filepath.Join(dir, "typo.toml"), "[device]\ntype = \"tpm\"\npath = \"/dev/tpmrm0\"\nauth_fil = \"a\"\n")
	for _, x := range []struct{ args, says string }{
		{"probe", "name one device"},
		{"probe -c " + typo, "[device]: auth_fil: no such field"},
		{"probe --uri pkcs11:token=x --tpm /dev/tpmrm0", "name one device"},
		{"probe --next --tpm /dev/tpmrm0", "--next goes with --config"},
		{"probe --tpm /dev/tpmrm0 --curve P-521", "P-521"},
		{"probe --tpm /dev/tpm0", "resource manager"},
		{"probe --uri token=x --pin-file y", "pkcs11:"},
		{"probe --uri pkcs11:token=x?module-path=/none.so --pin-file " + none, "/none.so"},
		{"probe x", "takes no arguments"},
		{"probe -c " + filepath.Join(dir, "missing.toml"), "missing.toml"},
		{"probe -c " + none, "no section [device]"},
		{"probe --next -c " + kind, "no section [next_device]"},
		{"probe -c " + kind, `"usb"`},
		{"probe -c " + noPIN, "the PIN is missing"},
		{"bench --tpm /dev/tpmrm0 --for 0s", "above 0"},
	} {
		if _, _, err := cli(t, "", append([]string{"device"}, strings.Fields(x.args)...)...); err == nil || !strings.Contains(err.Error(), x.says) {
			t.Errorf("device %s: %v does not say %q", x.args, err, x.says)
		}
	}
}

func TestNodeRekeyUsage(t *testing.T) {
	noEnvironment(t)
	dir := t.TempDir()
	card := func(name, text string) string { return writeText(t, filepath.Join(dir, name), text) }
	good := card("good.json", `{"format":1,"node":"de-1","suite":"MLKEM768-P256","signing_suite":"ECDSA-P256-SHA256","root":2,"possession":"AA=="}`)
	for _, x := range []struct{ args, says string }{
		{"rekey", "takes NODE"},
		{"rekey de-1 --reason x", "--card is missing"},
		{"rekey de-1 --card " + good, "--reason is missing"},
		{"rekey fr-1 --reason x --card " + good, "is the card of node de-1"},
		{"rekey de-1 --reason x --card " + filepath.Join(dir, "none"), "none"},
		{"rekey de-1 --reason x --card " + card("text", "hello"), "not a card"},
		{"rekey de-1 --reason x --card " + card("old", `{"format":1,"node":"de-1"}`), "next-node.json"},
		{"rekey de-1 --reason x --card " + card("suite", `{"format":1,"node":"de-1","suite":"none","root":2,"possession":"AA=="}`), `"none"`},
	} {
		_, _, err := cli(t, "", append([]string{"node"}, strings.Fields(x.args)...)...)
		if err == nil || exitCode(err) != 2 || !strings.Contains(err.Error(), x.says) {
			t.Errorf("node %s: %v does not say %q", x.args, err, x.says)
		}
	}
}
