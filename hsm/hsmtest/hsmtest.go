// Package hsmtest makes SoftHSM tokens for tests, one directory for each, so
// that tests do not meet and a token can be taken away or broken.
package hsmtest

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms/secret"
)

// Token is an initialised SoftHSM token without keys in it.
type Token struct {
	Dir      string // everything is below it; removed with the test
	ConfFile string // the SoftHSM configuration, for SOFTHSM2_CONF of a child process
	Tokens   string // SoftHSM's token directory
	PINFile  string // the user PIN, mode 0600
	Label    string
	Module   string // the system's SoftHSM library, for a child process
	ChildURI string // the token through the system's library
	URI      string // the token through a copy of the library, for this process
}

// New makes a token with a random PIN in a directory of the test. Any number of
// tokens works in one process: each comes with a copy of the library, since a
// library reads its configuration once. Without SoftHSM the test is skipped, or
// fails when CI=true.
func New(t testing.TB) *Token {
	t.Helper()
	if _, err := hsm.FindSoftHSM(); errors.Is(err, hsm.ErrModule) {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	dir := t.TempDir()
	var raw, name [8]byte
	_, _ = rand.Read(raw[:]) // crypto/rand.Read never returns an error
	_, _ = rand.Read(name[:])
	pin, err := secret.Copy([]byte(hex.EncodeToString(raw[:])))
	if err != nil {
		t.Fatal(err)
	}
	defer pin.Destroy()
	tok := &Token{Dir: dir, Label: "test-" + hex.EncodeToString(name[:]), PINFile: filepath.Join(dir, "pin")}
	if err := os.WriteFile(tok.PINFile, append(append([]byte(nil), pin.Reveal()...), '\n'), 0o600); err != nil {
		t.Fatal(err)
	}
	soft, err := hsm.CreateSoftToken(context.Background(), filepath.Join(dir, "softhsm"), tok.Label, pin)
	if err != nil {
		t.Fatal(err)
	}
	lib, err := hsm.CopyLibrary(soft.Dir)
	if err != nil {
		t.Fatal(err)
	}
	tok.ConfFile, tok.Tokens = soft.ConfFile, filepath.Join(soft.Dir, "tokens")
	tok.Module, tok.ChildURI = soft.Module, soft.URI
	tok.URI = (&hsm.URI{Token: tok.Label, Serial: soft.Serial, ModulePath: lib}).String()
	return tok
}

// Config returns the configuration to provision and open the token in this process.
func (tok *Token) Config() hsm.Config {
	return hsm.Config{URI: tok.URI, PINFile: tok.PINFile, SoftHSMConf: tok.ConfFile}
}

// Provision makes the device keys of cfg.
func (tok *Token) Provision(t testing.TB, cfg hsm.Config) {
	t.Helper()
	if err := hsm.Provision(context.Background(), cfg); err != nil {
		t.Fatal(err)
	}
}

// Open opens the device and closes it with the test.
func (tok *Token) Open(t testing.TB, cfg hsm.Config) *hsm.Device {
	t.Helper()
	d, err := hsm.Open(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// Device makes a token, provisions it on P-384 and opens it.
func Device(t testing.TB) *hsm.Device {
	t.Helper()
	tok := New(t)
	tok.Provision(t, tok.Config())
	return tok.Open(t, tok.Config())
}
