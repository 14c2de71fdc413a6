package e2e

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/test/harness"
)

// says wants a program to have failed with a message on one matter, in which all
// the words stand: what is wrong, where, and what to do next. It must not look
// like a crash.
func says(t *testing.T, r harness.Result, err error, words ...string) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	if r.Code == 0 {
		t.Fatalf("%v succeeded", r.Args)
	}
	text := strings.TrimSpace(r.Stderr)
	t.Logf("%s", text)
	for _, w := range words {
		if !strings.Contains(text, w) {
			t.Errorf("the message does not say %q: %s", w, text)
		}
	}
	for _, w := range []string{"panic:", "goroutine ", "SIGSEGV", "0x0 pc="} {
		if strings.Contains(text, w) {
			t.Errorf("the message looks like a crash: %s", text)
		}
	}
	last := text[strings.LastIndexByte(text, '\n')+1:]
	if !strings.HasPrefix(last, "conclave") || len(last) > 600 {
		t.Errorf("the last line is not a message of the program: %s", last)
	}
}

// variant writes a node's configuration with a pattern replaced, beside the
// original, and returns its path.
func variant(t *testing.T, n *harness.Node, pattern, replacement string) string {
	t.Helper()
	b, err := os.ReadFile(n.Config)
	if err != nil {
		t.Fatal(err)
	}
	re := regexp.MustCompile(pattern)
	if !re.Match(b) {
		t.Fatalf("%s has nothing like %s", n.Config, pattern)
	}
	f := filepath.Join(n.Dir, "variant.toml")
	if err := os.WriteFile(f, re.ReplaceAll(b, []byte(replacement)), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.Remove(f) })
	return f
}

// mustNotStart runs a node on the configuration and wants it to say why it cannot.
func (s site) mustNotStart(t *testing.T, config string, words ...string) {
	t.Helper()
	r, err := harness.Run(t.Context(), s.c.Bin.Conclaved, harness.Env{"PATH": os.Getenv("PATH")}, nil, "run", "--config", config)
	says(t, r, err, words...)
}

// TestNodeRefusesToStart: what a newcomer gets wrong in a node's surroundings is
// named with the next step.
func TestNodeRefusesToStart(t *testing.T) {
	s := site{t, cluster(t)}
	fr, jp := s.c.Nodes["fr"], s.c.Nodes["jp"]
	run := s.mustNotStart

	t.Run("no module", func(t *testing.T) {
		run(t, variant(t, fr, `module-path=[^&"]*`, "module-path=/nowhere/libpkcs11.so"), "/nowhere/libpkcs11.so", "nstall")
	})
	t.Run("wrong PIN", func(t *testing.T) {
		pin := filepath.Join(t.TempDir(), "pin")
		if err := os.WriteFile(pin, []byte("wrong-pin-of-a-test"), 0o600); err != nil {
			t.Fatal(err)
		}
		f := variant(t, fr, `pin-source=[^&"]*`, "pin-source=file:"+pin)
		run(t, f, "PIN", "correct the PIN")
		r, err := harness.Run(t.Context(), s.c.Bin.Conclaved, nil, nil, "run", "--config", f)
		if err != nil || strings.Contains(r.Stderr, "wrong-pin-of-a-test") {
			t.Errorf("the PIN is in the message: %v", err)
		}
	})
	t.Run("PIN for everybody to read", func(t *testing.T) {
		pin := filepath.Join(t.TempDir(), "pin")
		if err := os.WriteFile(pin, []byte("12345678"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(pin, 0o644); err != nil {
			t.Fatal(err)
		}
		run(t, variant(t, fr, `pin-source=[^&"]*`, "pin-source=file:"+pin), pin, "chmod 600")
	})
	t.Run("no token", func(t *testing.T) {
		run(t, variant(t, fr, `pkcs11:[^?]*`, "pkcs11:token=no-such-token"), "token", "conclave-fr")
	})
	t.Run("no TPM", func(t *testing.T) {
		run(t, variant(t, jp, `unix:[^"]*`, "unix:/nowhere/swtpm.sock"), "/nowhere/swtpm.sock")
	})
	t.Run("no TPM authorisation", func(t *testing.T) {
		run(t, variant(t, jp, `auth_file = "[^"]*"`, `auth_file = "nowhere/auth"`), "nowhere/auth")
	})
	t.Run("unknown field", func(t *testing.T) {
		f := variant(t, fr, `(?m)^listen = `, "lisen = \"x\"\nlisten = ")
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		line := 1 + strings.Count(string(b[:strings.Index(string(b), "lisen")]), "\n")
		run(t, f, f+":"+itoa(line)+":", "cluster.lisen", "no such field")
	})
	t.Run("missing field", func(t *testing.T) {
		run(t, variant(t, fr, `(?m)^site .*$`, ""), "variant.toml:", "site", "missing")
	})
	t.Run("wrong value", func(t *testing.T) {
		run(t, variant(t, fr, `type = "pkcs11"`, `type = "yubikey"`), "variant.toml:", "device.type", "yubikey", "pkcs11", "tpm")
	})
	t.Run("no configuration", func(t *testing.T) { run(t, "/nowhere/conclaved.toml", "/nowhere/conclaved.toml") })
	t.Run("running already", func(t *testing.T) { run(t, fr.Config, "another process") })
}

// TestNodeRefusesNeighbours: a port, document, certificate or device that is
// somebody else's, or nobody's, is named with the next step.
func TestNodeRefusesNeighbours(t *testing.T) {
	s := site{t, cluster(t)}
	fr, de := s.c.Nodes["fr"], s.c.Nodes["de"]
	run := s.mustNotStart
	if err := fr.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Run("API port in use", func(t *testing.T) {
		address := strings.TrimPrefix(de.API, "https://")
		run(t, variant(t, fr, `(?s)\[api\]\nlisten = "[^"]*"`, "[api]\nlisten = \""+address+"\""), "api.listen", address, "in use", "another port")
	})
	t.Run("cluster port in use", func(t *testing.T) {
		address := strings.TrimPrefix(de.API, "https://")
		run(t, variant(t, fr, `(?s)\[cluster\]\nlisten = "[^"]*"`, "[cluster]\nlisten = \""+address+"\""), "cluster.listen", address, "in use", "another port")
	})
	t.Run("no genesis", func(t *testing.T) {
		run(t, variant(t, fr, `genesis  = "[^"]*"`, `genesis = "nowhere.cbor"`), "nowhere.cbor", "genesis create")
	})
	certificate := `(?s)certificate = "[^"]*"\nkey\s+= "[^"]*"`
	t.Run("another node's certificate", func(t *testing.T) {
		run(t, variant(t, fr, certificate, "certificate = \"../de/node.crt\"\nkey = \"../de/node.key\""), "certificate", "de-1", "spiffe://fr.example/node/fr-1")
	})
	t.Run("a client's certificate", func(t *testing.T) {
		run(t, variant(t, fr, certificate, "certificate = \"../clients/fr-service.crt\"\nkey = \"../clients/fr-service.key\""), "certificate", "spiffe://fr.example/service/", "spiffe://fr.example/node/fr-1")
	})
	t.Run("a key that is not the certificate's", func(t *testing.T) {
		run(t, variant(t, fr, certificate, "certificate = \"node.crt\"\nkey = \"../de/node.key\""), "certificate", "key")
	})
	t.Run("no certificate", func(t *testing.T) {
		run(t, variant(t, fr, certificate, "certificate = \"nowhere.crt\"\nkey = \"node.key\""), "nowhere.crt")
	})
	t.Run("another site's device", func(t *testing.T) {
		own, err := os.ReadFile(de.Config)
		if err != nil {
			t.Fatal(err)
		}
		device := string(own[strings.Index(string(own), "[device]"):])
		run(t, variant(t, fr, `(?s)\[device\].*`, strings.ReplaceAll(device, "$", "$$")), "device")
	})
}

// TestDevNamesWhatToInstall: without its tools the development cluster says which
// package to install and leaves nothing behind.
func TestDevNamesWhatToInstall(t *testing.T) {
	bin := binaries(t)
	dev := func(t *testing.T, env harness.Env, words ...string) {
		t.Helper()
		dir := filepath.Join(t.TempDir(), "d")
		r, err := harness.Run(t.Context(), bin.Conclaved, env, nil, "dev", "--dir", dir)
		says(t, r, err, words...)
		if _, err := os.Stat(filepath.Join(dir, "env")); err == nil {
			t.Error("there is an env file of a cluster that does not run")
		}
	}
	t.Run("no SoftHSM", func(t *testing.T) {
		dev(t, harness.Env{"PATH": os.Getenv("PATH"), "SOFTHSM2_MODULE": "/nowhere/libsofthsm2.so"}, "SOFTHSM2_MODULE", "/nowhere/libsofthsm2.so")
	})
	t.Run("no swtpm", func(t *testing.T) {
		dev(t, harness.Env{"PATH": "/nowhere"}, "install", "swtpm", "swtpm-tools")
	})
	t.Run("no directory", func(t *testing.T) {
		r, err := harness.Run(t.Context(), bin.Conclaved, nil, nil, "dev")
		says(t, r, err, "--dir", "for example")
	})
	t.Run("directory of something else", func(t *testing.T) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "thesis.txt"), []byte("years of work"), 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := harness.Run(t.Context(), bin.Conclaved, harness.Env{"PATH": os.Getenv("PATH")}, nil, "dev", "--dir", dir)
		says(t, r, err, dir, "choose another --dir")
		if _, err := os.Stat(filepath.Join(dir, "thesis.txt")); err != nil {
			t.Error(err)
		}
	})
}

// TestCommandSaysWhatToDo: mistakes at the conclave command.
func TestCommandSaysWhatToDo(t *testing.T) {
	s := site{t, cluster(t)}
	words := unique("words")
	s.key("coalition", words, "encrypt", "")
	s.key("europe", words, "encrypt", "")
	shared, european := "coalition/"+words, "europe/"+words
	env := s.c.Env("fr")
	p := s.propose("rotate", "coalition", words)
	for name, c := range map[string]struct {
		env   harness.Env
		args  []string
		code  int
		words []string
	}{
		"no residency":        {env, []string{"keyring", "create", "pacific", "--policy", "keys"}, 2, []string{"--residency is missing", "for example"}},
		"no policy":           {env, []string{"keyring", "create", "pacific", "--residency", "fr"}, 2, []string{"--policy is missing", "policy list"}},
		"unknown site":        {env, []string{"keyring", "create", "pacific", "--residency", "fr,us", "--policy", "keys"}, -1, []string{"us"}},
		"not of the keyring":  {s.c.EnvAs("jp", "jp"), []string{"keyring", "create", "atlantic", "--residency", "fr,de", "--policy", "keys"}, 7, []string{"fr"}},
		"not resident":        {s.c.EnvAs("jp", "fr"), []string{"encrypt", european, "x"}, 7, []string{"europe", "jp-1", s.c.API("fr")}},
		"no right":            {s.c.Env("jp"), []string{"encrypt", european, "x"}, 3, []string{"may not encrypt", european, "access policy"}},
		"no such key":         {env, []string{"encrypt", "coalition/nothing", "x"}, -1, []string{"nothing", "coalition"}},
		"no purpose":          {env, []string{"key", "create", "coalition/x"}, 2, []string{"--purpose is missing", "encrypt, mac or sign"}},
		"key exists":          {env, []string{"key", "create", shared, "--purpose", "encrypt"}, 5, []string{words}},
		"wrong purpose":       {env, []string{"sign", shared, "x"}, -1, []string{words}},
		"no reason":           {env, []string{"key", "rotate", shared}, 2, []string{"--reason is missing"}},
		"a proposal is open":  {env, []string{"key", "rotate", shared, "--reason", "again"}, 5, []string{p.ID, "still open"}},
		"no such proposal":    {env, []string{"proposal", "show", strings.Repeat("0", 32)}, 4, []string{"no proposal"}},
		"no custodian key":    {env, []string{"proposal", "approve", p.ID}, 2, []string{"--custodian-key is missing", "custodian keygen"}},
		"no address":          {env.With("CONCLAVE_ADDR", ""), []string{"status"}, 1, []string{"CONCLAVE_ADDR"}},
		"nobody there":        {env.With("CONCLAVE_ADDR", "https://127.0.0.1:1"), []string{"status"}, 7, []string{"127.0.0.1:1", "check that the node runs"}},
		"no CA":               {env.With("CONCLAVE_CACERT", ""), []string{"status"}, 1, []string{"CONCLAVE_CACERT"}},
		"another CA":          {env.With("CONCLAVE_CACERT", strangersCA(t)), []string{"status"}, 3, []string{"CONCLAVE_CACERT", "not issued by"}},
		"not a ciphertext":    {env, []string{"decrypt", shared, "%%%"}, 2, []string{"not base64"}},
		"a misspelled flag":   {env, []string{"key", "create", "coalition/x", "--purpos", "mac"}, 2, []string{"--purpos", "--help"}},
		"evidence too early":  {env, []string{"evidence", "get", p.ID}, -1, []string{p.ID}},
		"a wrong passphrase":  {env, []string{"proposal", "approve", p.ID, "--yes", "--custodian-key", custodianKey(s, "fr-1"), "--pass-file", passFile(s, "fr-2")}, -1, []string{"passphrase"}},
		"verify without id":   {nil, []string{"evidence", "verify", "x.json"}, 2, []string{"--cluster is missing", "conclave status"}},
		"no certificate file": {env.With("CONCLAVE_ADMIN_CERT", "/nowhere.crt"), []string{"status"}, 1, []string{"/nowhere.crt", "CONCLAVE_CLIENT_CERT"}},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := s.c.CLI(t.Context(), c.env, c.args...)
			says(t, r, err, c.words...)
			if c.code > 0 && r.Code != c.code {
				t.Errorf("exit code %d instead of %d", r.Code, c.code)
			}
		})
	}
}

func custodianKey(s site, id string) string { k, _ := s.c.CustodianFiles(id); return k }
func passFile(s site, id string) string     { _, p := s.c.CustodianFiles(id); return p }

// TestExpiredProposal: an approval that comes too late is refused with the cause.
func TestExpiredProposal(t *testing.T) {
	s := site{t, cluster(t)}
	late := unique("late")
	s.key("coalition", late, "encrypt", "")
	var p struct {
		ID string `json:"id"`
	}
	r, err := s.c.CLI(t.Context(), s.c.Env("fr"), "key", "rotate", "coalition/"+late, "--reason", "in a hurry", "--expires", "7s", "-o", "json")
	if err != nil {
		t.Fatal(err)
	}
	if err := r.JSON(&p); err != nil {
		t.Fatal(err)
	}
	s.expires(p.ID, time.Minute)
	r, err = s.c.CLI(t.Context(), s.c.Env("de"), "proposal", "approve", p.ID, "--yes", "--custodian-key", custodianKey(s, "de-1"), "--pass-file", passFile(s, "de-1"))
	says(t, r, err, p.ID, "expired", "new")
	if r.Code != 5 {
		t.Errorf("exit code %d", r.Code)
	}
}
