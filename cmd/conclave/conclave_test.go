package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

func TestMain(m *testing.M) { testscript.Main(m, map[string]func(){"conclave": main}) }

// TestScripts runs the program itself; see testdata.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{Dir: "testdata", RequireExplicitExec: true, Cmds: map[string]func(*testscript.TestScript, bool, []string){
		// exits CODE COMMAND... runs a command that must end with the code.
		"exits": func(ts *testscript.TestScript, _ bool, args []string) {
			err := ts.Exec(args[1], args[2:]...)
			got := 0
			var exit interface{ ExitCode() int }
			switch {
			case errors.As(err, &exit):
				got = exit.ExitCode()
			case err != nil:
				ts.Fatalf("%v", err)
			}
			if fmt.Sprint(got) != args[0] {
				ts.Fatalf("exit code %d, want %s", got, args[0])
			}
		},
	}})
}

// cli runs a command line in this process without any environment of ours.
func cli(t testing.TB, stdin string, args ...string) (stdout, stderr string, err error) {
	t.Helper()
	var out, errOut bytes.Buffer
	root := rootCommand()
	root.SetArgs(args)
	root.SetIn(strings.NewReader(stdin))
	root.SetOut(&out)
	root.SetErr(&errOut)
	err = root.ExecuteContext(t.Context())
	return out.String(), errOut.String(), err
}

func noEnvironment(t *testing.T) {
	t.Helper()
	for _, e := range os.Environ() {
		if name, _, _ := strings.Cut(e, "="); strings.HasPrefix(name, "CONCLAVE_") {
			t.Setenv(name, "")
		}
	}
}

func TestWrongUsage(t *testing.T) {
	noEnvironment(t)
	for _, x := range []struct{ args, says string }{
		{"frobnicate", `has no command "frobnicate"; see: conclave --help`},
		{"statu", `did you mean "status"?`},
		{"key frobnicate", "see: conclave key --help"},
		{"custodian keygem", `did you mean "keygen"?`},
		{"encrypt", "conclave encrypt takes KEYRING/KEY VALUE; see: conclave encrypt --help"},
		{"encrypt a/b c d", "takes KEYRING/KEY VALUE"},
		{"encrypt ab c", "KEYRING/KEY"},
		{"encrypt a/b/c d", "key"},
		{"encrypt A/b c", "a-z"},
		{"encrypt a/b c --context x", "--context\" flag: \"x\" is not NAME=VALUE"},
		{"encrypt a/b c --context =x", "is not NAME=VALUE"},
		{"encrypt a/b c -c x=1 -c x=2", "--context\" flag: x is given twice"},
		{"encrypt a/b c --contexts x=1", "unknown flag: --contexts; see: conclave encrypt --help"},
		{"decrypt a/b %%%", "CIPHERTEXT is not base64"},
		{"rewrap a/b %%%", "CIPHERTEXT is not base64"},
		{"verify-mac a/b m %%%", "MAC is not base64"},
		{"verify a/b m %%%", "SIGNATURE is not base64"},
		{"verify a/b m", "takes KEYRING/KEY VALUE SIGNATURE"},
		{"verify a/b m AAAA --version x", "--version"},
		{"verify a/b m AAAA --version -1", "--version"},
		{"datakey", "KEYRING/KEY"},
		{"datakey a/b --bytes x", "--bytes"},
		{"public-key", "KEYRING/KEY"},
		{"export", "KEYRING/KEY [WRAPPED]"},
		{"export a/b c d", "KEYRING/KEY [WRAPPED]"},
		{"export a/b", "either WRAPPED or --version"},
		{"export a/b AAAA --version 1", "either WRAPPED or --version"},
		{"export a/b %%%", "WRAPPED is not base64"},
		{"export a/b AAAA --suite rsa", `--suite "rsa" is not known`},
		{"keyring create", "takes NAME"},
		{"keyring create x", "--residency is missing"},
		{"keyring create x --residency fr", "--policy is missing"},
		{"keyring create x --residency fr --policy p --max-staleness 10", "--max-staleness"},
		{"keyring list x", "takes no arguments"},
		{"key create a", "KEYRING/KEY"},
		{"key create a/b", "--purpose is missing"},
		{"key list", "takes KEYRING"},
		{"key list A", "a-z"},
		{"key rotate a/b", "--reason is missing"},
		{"key rotate a/b --reason x --version 1", "unknown flag: --version"},
		{"key deactivate a/b --reason x", "--version is missing"},
		{"key destroy a/b --reason x", "either --version N or --all"},
		{"key destroy a/b --reason x --version 1 --all", "either --version N or --all"},
		{"proposal approve", "takes ID"},
		{"proposal approve x", "--custodian-key is missing"},
		{"proposal show", "takes ID"},
		{"custodian keygen", "--out is missing"},
		{"custodian keygen x", "takes no arguments"},
		{"custodian add", "takes ID"},
		{"custodian add x", "--site and --key are needed"},
		{"custodian add x --site fr --key nosuch --reason x", "nosuch"},
		{"custodian revoke x", "--reason is missing"},
		{"policy show", "takes NAME"},
		{"policy set x --reason x", "--rules is missing"},
		{"policy set x --rules nosuch --reason x", "nosuch"},
		{"node promote x", "--reason is missing"},
		{"node join --reason x", "--card is missing"},
		{"site add x --reason x", "--ca is missing"},
		{"backup create", "--out is missing"},
		{"backup verify x", "--cluster is missing"},
		{"backup verify nosuch --cluster x", "nosuch"},
		{"backup restore x", "--statement is missing"},
		{"recover prepare", "--voters, --reason and --out are needed"},
		{"ceremony run x", "--dir and --reason are needed"},
		{"ceremony contribute x", "--out is missing"},
		{"ceremony show nosuch", "nosuch"},
		{"ceremony verify nosuch", "nosuch"},
		{"recovery create x --reason x", "--residency and --card are needed"},
		{"evidence get", "takes PROPOSAL"},
		{"evidence verify x", "--cluster is missing"},
		{"status -o yaml", `--output "yaml" is not table or json`},
		{"status --timeout soon", "--timeout"},
		{"status x", "takes no arguments"},
	} {
		t.Run(x.args, func(t *testing.T) {
			_, _, err := cli(t, "", strings.Fields(x.args)...)
			if got := exitCode(err); err == nil || got != 2 {
				t.Errorf("exit code %d: %v", got, err)
			} else if !strings.Contains(err.Error(), x.says) {
				t.Errorf("%q does not say %q", err, x.says)
			}
		})
	}
}

func TestExitCodes(t *testing.T) {
	want := map[kms.Kind]int{
		kms.Unauthenticated: 3, kms.Denied: 3, kms.NeedsApproval: 3, kms.NotFound: 4, kms.Exists: 5, kms.Conflict: 5, kms.Expired: 5, kms.Replayed: 5,
		kms.OpenFailed: 6, kms.BadSignature: 6, kms.Unavailable: 7, kms.Stale: 7, kms.Unknown: 8, kms.ReadOnly: 7, kms.NotResident: 7,
		kms.Internal: 1, kms.Invalid: 1, kms.TooLarge: 1,
	}
	for k := kms.Internal; !strings.HasPrefix(k.String(), "kind-"); k++ {
		code, ok := want[k]
		if got := exitCode(fmt.Errorf("outer: %w", kms.Errorf(k, "x"))); !ok || got != code {
			t.Errorf("%v: exit code %d, want %d", k, got, code)
		}
	}
	if got := exitCode(io.EOF); got != 1 {
		t.Errorf("any error: %d", got)
	}
	if got := exitCode(usageError{kms.Errorf(kms.NotFound, "x")}); got != 2 {
		t.Errorf("usage: %d", got)
	}
}

// TestEveryCommandIsDescribed holds that whoever reads the help finds words, and
// that no level swallows a mistyped command.
func TestEveryCommandIsDescribed(t *testing.T) {
	var walk func(c *cobra.Command)
	n := 0
	walk = func(c *cobra.Command) {
		n++
		if c.Short == "" || strings.HasSuffix(c.Short, ".") || !c.Runnable() {
			t.Errorf("%s: short description %q, runnable %v", c.CommandPath(), c.Short, c.Runnable())
		}
		for _, sub := range c.Commands() {
			walk(sub)
		}
	}
	walk(rootCommand())
	if n < 35 {
		t.Errorf("%d commands", n)
	}
	if out, _, err := cli(t, "", "key"); err != nil || !strings.Contains(out, "rotate") {
		t.Errorf("%v: %s", err, out)
	}
}

func TestInput(t *testing.T) {
	file := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(file, []byte("from a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := &cobra.Command{}
	cmd.SetIn(strings.NewReader("from stdin"))
	for arg, want := range map[string]string{"-": "from stdin", "@" + file: "from a file", "plain": "plain", "": "", "--": "--"} {
		got, err := input(cmd, arg)
		if err != nil || string(got) != want || got == nil {
			t.Errorf("%q: %q, %v", arg, got, err)
		}
	}
	if _, err := input(cmd, "@"+file+".none"); err == nil {
		t.Error("a missing file was read")
	}
}

func TestProgressAndTables(t *testing.T) {
	at := time.UnixMilli(1767225600000)
	if when(time.Time{}) != "-" || when(at) != "2026-01-01 00:00:00Z" {
		t.Error(when(at))
	}
	if keyState(wire.Key{Suspended: true}) != "suspended" || keyState(wire.Key{}) != "destroyed" || keyState(wire.Key{Primary: 1}) != "active" {
		t.Error("the state of a key")
	}
	if s := nextRotation(wire.Key{Overdue: true, NextRotation: at}); !strings.HasPrefix(s, "OVERDUE ") {
		t.Error(s)
	}
	var out bytes.Buffer
	a := &app{output: "json"}
	cmd := &cobra.Command{}
	cmd.SetOut(&out)
	if err := a.show(cmd, map[string]string{"a": "<b>"}, nil); err != nil || out.String() != "{\n  \"a\": \"<b>\"\n}\n" {
		t.Errorf("%v: %s", err, out.String())
	}
}

// TestSignedBytesAreShown holds that what a custodian reads is decoded from the
// bytes, and that nothing in them can pass for something else on a terminal.
func TestSignedBytesAreShown(t *testing.T) {
	p := approval.Proposal{
		Format: approval.ProposalFormat, Cluster: strings.Repeat("ab", 16), Nonce: make([]byte, approval.NonceSize), Action: kms.ActionRotate,
		Target: approval.KeyTarget("ring", "key"), Revision: 7, Policy: "keys", PolicyRevision: 3, Proposer: "spiffe://fr.example/operator/admin",
		Created: 1767225600000, Expires: 1767229200000, Reason: "due\x1b[2Jnow",
	}
	b := p.Marshal()
	cmd := &cobra.Command{}
	var out bytes.Buffer
	cmd.SetErr(&out)
	cmd.SetIn(strings.NewReader("no\n"))
	if err := (&app{}).confirm(cmd, approval.Approve, b, p); exitCode(err) != 2 || !strings.Contains(err.Error(), "nothing was signed") {
		t.Errorf("%v", err)
	}
	for _, want := range []string{approval.ProposalID(b), p.Cluster, "rotate", "key/ring/key", "keys, revision 3", p.Proposer, "2026-01-01 00:00:00Z", `due\x1b[2Jnow`, fmt.Sprintf("%x", b), "Approve this?"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("%q is not shown:\n%s", want, out.String())
		}
	}
	if strings.Contains(out.String(), "\x1b") {
		t.Error("the reason reaches the terminal as it is")
	}
	cmd.SetIn(strings.NewReader("yes\n"))
	if err := (&app{}).confirm(cmd, approval.Approve, b, p); err != nil {
		t.Error(err)
	}
}

func TestCustodianKeyFiles(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for name, text := range map[string]string{"pass": "correct horse\n", "wrong": "wrong horse", "empty": "\n", "garbage": "not a key"} {
		if err := os.WriteFile(at(name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	want := writeCustodian(t, at("key"), "correct horse")
	cmd := &cobra.Command{}
	key, fingerprint, err := openKeyFile(cmd, at("key"), at("pass"))
	if err != nil || fingerprint != want {
		t.Fatal(fingerprint, err)
	}
	key.Destroy()
	for _, x := range []struct {
		key, pass string
		code      int
		says      string
	}{
		{"key", "wrong", 6, "wrong passphrase"}, {"key", "empty", 6, "wrong passphrase"}, {"garbage", "pass", 1, "garbage"},
		{"none", "pass", 1, "custodian key: "}, {"key", "none", 1, "passphrase file: "}, {"key.pub", "pass", 1, "key.pub"},
	} {
		_, _, err := openKeyFile(cmd, at(x.key), at(x.pass))
		if got := exitCode(err); err == nil || got != x.code || !strings.Contains(err.Error(), x.says) {
			t.Errorf("%s with %s: %d, %v", x.key, x.pass, got, err)
		}
		if err != nil && strings.Contains(err.Error(), "horse") {
			t.Errorf("the passphrase is in %q", err)
		}
	}
	for _, x := range []struct {
		out, pass string
		code      int
	}{{"key", "pass", 5}, {"new", "empty", 1}, {"new", "none", 1}} {
		if _, _, err := cli(t, "", "custodian", "keygen", "--out", at(x.out), "--pass-file", at(x.pass)); exitCode(err) != x.code || err == nil {
			t.Errorf("%+v: %v", x, err)
		}
	}
	// A public key in the way leaves no half of a pair.
	if err := os.WriteFile(at("half.pub"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := cli(t, "", "custodian", "keygen", "--out", at("half"), "--pass-file", at("pass")); exitCode(err) != 5 {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(at("half")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("half a pair is left: %v", err)
	}
}

// writeCustodian writes a key pair whose passphrase costs as little as it may.
func writeCustodian(t testing.TB, path, passphrase string) (fingerprint string) {
	t.Helper()
	must := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	pass, err := secret.Copy([]byte(passphrase))
	must(err)
	defer pass.Destroy()
	key, err := pqc.GenerateHybrid(nil)
	must(err)
	defer key.Destroy()
	encrypted, err := pqc.EncryptKeyFile(key, pass, pqc.KeyFileOptions{WorkFactor: pqc.MinWorkFactor})
	must(err)
	public, err := pqc.MarshalPublic(pqc.MLDSA65Ed25519, key.PublicKey())
	must(err)
	must(create(path, encrypted, 0o600))
	must(create(path+".pub", public, 0o644))
	return pqc.Fingerprint(key.PublicKey())
}

func TestPairsAndFlags(t *testing.T) {
	noEnvironment(t)
	got := contextPairs{}
	if err := errors.Join(got.Set("a=b=c"), got.Set("d=")); err != nil || got["a"] != "b=c" || got["d"] != "" || len(got) != 2 {
		t.Errorf("%v, %v", got, err)
	}
	_, _, err := cli(t, "", "status", "--cacert", "/nonexistent/ca", "--cert", "c", "--key-file", "k")
	if err == nil || !strings.Contains(err.Error(), "/nonexistent/ca") {
		t.Errorf("%v", err)
	}
}
