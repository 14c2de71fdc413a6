package tpm_test

import (
	"crypto/ecdh"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/tpm"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

func wantErr(t *testing.T, what string, err, kind error) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Errorf("%s: %v, want %v", what, err, kind)
	}
}

func openErr(t *testing.T, cfg tpm.Config) error {
	t.Helper()
	d, err := tpm.Open(t.Context(), cfg)
	if err == nil {
		d.Close()
	}
	return err
}

func TestProvision(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	cfg := p.Config()
	ctx := t.Context()
	wantErr(t, "opening a new TPM", openErr(t, cfg), tpm.ErrNotProvisioned)
	if err := tpm.Provision(ctx, cfg); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "provisioning again", tpm.Provision(ctx, cfg), tpm.ErrProvisioned)
	if err := openErr(t, cfg); err != nil {
		t.Fatal(err)
	}

	wrongCurve := cfg
	wrongCurve.Curve = ecdh.P256()
	wantErr(t, "opening with the other curve", openErr(t, wrongCurve), tpm.ErrUnsafe)
	wantErr(t, "provisioning over the other curve", tpm.Provision(ctx, wrongCurve), tpm.ErrInvalid)

	otherBase := cfg
	otherBase.PersistentBase = 0x81080010
	wantErr(t, "opening other handles", openErr(t, otherBase), tpm.ErrNotProvisioned)

	stranger := otherBase
	stranger.AuthFile = filepath.Join(t.TempDir(), "auth")
	if err := tpm.NewAuthFile(stranger.AuthFile); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "provisioning another's TPM", tpm.Provision(ctx, stranger), tpm.ErrAuth)
	if err := tpm.Provision(ctx, otherBase); err != nil {
		t.Errorf("a second set of keys of the same owner: %v", err)
	}

	wrongAuth := cfg
	wrongAuth.AuthFile = stranger.AuthFile
	for range 5 {
		wantErr(t, "opening with a wrong secret", openErr(t, wrongAuth), tpm.ErrAuth)
	}
	if n := dictionaryAttacks(t, cfg); n != 0 {
		t.Errorf("wrong secrets counted as %d dictionary attacks", n)
	}
	if err := openErr(t, cfg); err != nil {
		t.Errorf("opening after wrong secrets: %v", err)
	}
	if n := loaded(t, cfg); n != 0 {
		t.Errorf("%d transient objects and sessions are left", n)
	}
}

// TestProvisionResumes: whatever key a broken-off run left out, running it
// again makes a whole set.
func TestProvisionResumes(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	cfg := p.Config()
	for _, missing := range [][]int{{}, {2}, {1, 2}, {0}, {0, 1, 2}} {
		if err := tpm.Provision(t.Context(), cfg); err != nil && !errors.Is(err, tpm.ErrProvisioned) {
			t.Fatal(err)
		}
		for _, i := range missing {
			if err := tpm.Apply(t.Context(), cfg, tpm.EvictKey(i)); err != nil {
				t.Fatal(err)
			}
		}
		if len(missing) > 0 {
			wantErr(t, fmt.Sprintf("opening without keys %v", missing), openErr(t, cfg), tpm.ErrNotProvisioned)
			if err := tpm.Provision(t.Context(), cfg); err != nil {
				t.Fatalf("without keys %v: %v", missing, err)
			}
		}
		if err := openErr(t, cfg); err != nil {
			t.Errorf("after a resumed run (%v): %v", missing, err)
		}
	}
}

func TestOpenRefusesLooserKeys(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	cfg := p.Config()
	if err := tpm.Provision(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	both := func(pub *tpm2.TPMTPublic) {
		pub.ObjectAttributes.SignEncrypt, pub.ObjectAttributes.Decrypt = true, true
		detail, err := pub.Parameters.ECCDetail()
		if err != nil {
			t.Fatal(err)
		}
		detail.Scheme = tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgNull}
	}
	for name, c := range map[string]struct {
		key    int
		change func(*tpm2.TPMTPublic)
	}{
		"exportable agreement key":       {1, func(p *tpm2.TPMTPublic) { p.ObjectAttributes.FixedTPM, p.ObjectAttributes.FixedParent = false, false }},
		"agreement key that also signs":  {1, both},
		"signing key that also decrypts": {2, both},
		"signing key under lockout":      {2, func(p *tpm2.TPMTPublic) { p.ObjectAttributes.NoDA = false }},
		"signing key with any hash": {2, func(p *tpm2.TPMTPublic) {
			d, _ := p.Parameters.ECCDetail()
			d.Scheme = tpm2.TPMTECCScheme{Scheme: tpm2.TPMAlgNull}
		}},
		"agreement key with a shorter name": {1, func(p *tpm2.TPMTPublic) { p.NameAlg = tpm2.TPMAlgSHA256 }},
		"agreement key with a policy":       {1, func(p *tpm2.TPMTPublic) { p.AuthPolicy = tpm2.TPM2BDigest{Buffer: make([]byte, 48)} }},
		"agreement key on another curve":    {1, func(p *tpm2.TPMTPublic) { d, _ := p.Parameters.ECCDetail(); d.CurveID = tpm2.TPMECCNistP256 }},
	} {
		if err := tpm.Apply(t.Context(), cfg, tpm.LoosenKey(c.key, c.change)); err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		wantErr(t, name, openErr(t, cfg), tpm.ErrUnsafe)
		wantErr(t, "provisioning over "+name, tpm.Provision(t.Context(), cfg), tpm.ErrInvalid)
		if err := tpm.Apply(t.Context(), cfg, tpm.LoosenKey(c.key, func(*tpm2.TPMTPublic) {})); err != nil {
			t.Fatal(err)
		}
		if err := openErr(t, cfg); err != nil {
			t.Fatalf("with the right key again: %v", err)
		}
	}
}

func TestHierarchies(t *testing.T) {
	p := tpmtest.New(t)
	cfg := p.Config()
	d := p.Open(cfg)
	if err := tpm.Apply(t.Context(), cfg, tpm.SetLockout(nil)); err != nil {
		t.Fatal(err)
	}
	wantErr(t, "opening without a lockout authorization", openErr(t, cfg), tpm.ErrUnsafe)
	wantErr(t, "checking without a lockout authorization", d.Check(t.Context()), tpm.ErrUnsafe)

	direct(t, cfg, tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}})
	wantErr(t, "a cleared TPM, opened", openErr(t, cfg), tpm.ErrNotProvisioned)
	wantErr(t, "a cleared TPM, checked", d.Check(t.Context()), tpm.ErrNotProvisioned)
	if err := tpm.Provision(t.Context(), cfg); err != nil {
		t.Errorf("provisioning after a clear: %v", err)
	}
	wantErr(t, "new keys under an old device", d.Check(t.Context()), tpm.ErrUnsafe)
}

func TestOwnedByOthers(t *testing.T) {
	for _, h := range []tpm2.TPMHandle{tpm2.TPMRHOwner, tpm2.TPMRHLockout} {
		p := tpmtest.New(t)
		direct(t, p.Config(), tpm2.HierarchyChangeAuth{
			AuthHandle: tpm2.AuthHandle{Handle: h, Auth: tpm2.PasswordAuth(nil)},
			NewAuth:    tpm2.TPM2BAuth{Buffer: []byte("somebody else's")},
		})
		wantErr(t, fmt.Sprintf("hierarchy %#x set by others", uint32(h)), tpm.Provision(t.Context(), p.Config()), tpm.ErrAuth)
	}
}

func TestConfig(t *testing.T) {
	dir := t.TempDir()
	auth := filepath.Join(dir, "auth")
	if err := tpm.NewAuthFile(auth); err != nil {
		t.Fatal(err)
	}
	if err := tpm.NewAuthFile(auth); !errors.Is(err, os.ErrExist) {
		t.Errorf("overwriting an auth file: %v", err)
	}
	write := func(name, text string, mode os.FileMode) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	good := tpm.Config{Path: "unix:" + filepath.Join(dir, "none"), AuthFile: auth}
	wantErr(t, "no socket", openErr(t, good), tpm.ErrUnavailable)
	const long = "correct horse battery staple"
	for name, change := range map[string]func(*tpm.Config){
		"no path":             func(c *tpm.Config) { c.Path = "" },
		"no auth file":        func(c *tpm.Config) { c.AuthFile = "" },
		"absent auth file":    func(c *tpm.Config) { c.AuthFile = filepath.Join(dir, "absent") },
		"readable auth file":  func(c *tpm.Config) { c.AuthFile = write("open", long, 0o644) },
		"short auth file":     func(c *tpm.Config) { c.AuthFile = write("short", "hunter2\n", 0o600) },
		"overlong auth file":  func(c *tpm.Config) { c.AuthFile = write("long", strings.Repeat("x", 4098), 0o600) },
		"auth directory":      func(c *tpm.Config) { c.AuthFile = dir },
		"bad descriptor":      func(c *tpm.Config) { c.AuthFile = "fd:x" },
		"closed descriptor":   func(c *tpm.Config) { c.AuthFile = "fd:65000" },
		"curve":               func(c *tpm.Config) { c.Curve = ecdh.P521() },
		"time-out":            func(c *tpm.Config) { c.CallTimeout = -1 },
		"base below":          func(c *tpm.Config) { c.PersistentBase = 0x80ffffff },
		"base above":          func(c *tpm.Config) { c.PersistentBase = 0x817ffffe },
		"device without a RM": func(c *tpm.Config) { c.Path = "/dev/tpm0" },
		"path without a kind": func(c *tpm.Config) { c.Path = filepath.Join(dir, "none") },
	} {
		cfg := good
		change(&cfg)
		err := openErr(t, cfg)
		wantErr(t, name, err, tpm.ErrInvalid)
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("%s: the error shows the secret", name)
		}
	}
	cfg := good
	cfg.Path = "/dev/tpmrm-none"
	wantErr(t, "absent device", openErr(t, cfg), tpm.ErrUnavailable)
	cfg.Path = write("tpmrm0", "", 0o600)
	wantErr(t, "file in place of a device", openErr(t, cfg), tpm.ErrUnavailable)
}

// TestAuthDescriptor: the secret may come from an inherited descriptor.
func TestAuthDescriptor(t *testing.T) {
	p := tpmtest.New(t)
	p.Open(p.Config())
	text, err := os.ReadFile(p.Config().AuthFile)
	if err != nil {
		t.Fatal(err)
	}
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := w.Write(text); err != nil {
		t.Fatal(err)
	}
	w.Close()
	cfg := p.Config()
	cfg.AuthFile = fmt.Sprintf("fd:%d", dup(t, r))
	if err := openErr(t, cfg); err != nil {
		t.Fatal(err)
	}
}

// dup gives a descriptor of its own, which the reader closes.
func dup(t *testing.T, f *os.File) int {
	t.Helper()
	fd, err := syscall.Dup(int(f.Fd()))
	if err != nil {
		t.Fatal(err)
	}
	return fd
}
