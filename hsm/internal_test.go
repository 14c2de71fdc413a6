package hsm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/conclave-kms/conclave/kms/secret"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// testToken is what hsmtest.New makes; that package cannot be imported from
// inside this one.
type testToken struct {
	cfg    Config
	tokens string
}

func newToken(t testing.TB) *testToken {
	t.Helper()
	if _, err := FindSoftHSM(); errors.Is(err, ErrModule) {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	dir := t.TempDir()
	var raw [8]byte
	_, _ = rand.Read(raw[:]) // crypto/rand.Read never returns an error
	pin, err := secret.Copy([]byte(hex.EncodeToString(raw[:])))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(pin.Destroy)
	soft, err := CreateSoftToken(context.Background(), filepath.Join(dir, "softhsm"), "test", pin)
	if err != nil {
		t.Fatal(err)
	}
	lib, err := CopyLibrary(soft.Dir)
	if err != nil {
		t.Fatal(err)
	}
	uri := (&URI{Token: "test", Serial: soft.Serial, ModulePath: lib}).String()
	return &testToken{Config{URI: uri, PIN: pin, SoftHSMConf: soft.ConfFile}, filepath.Join(soft.Dir, "tokens")}
}

func (tok *testToken) open(t testing.TB) *Device {
	t.Helper()
	d, err := Open(context.Background(), tok.cfg)
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

func openNew(t testing.TB) (*testToken, *Device) {
	t.Helper()
	tok := newToken(t)
	if err := Provision(context.Background(), tok.cfg); err != nil {
		t.Fatal(err)
	}
	return tok, tok.open(t)
}

// provisionLoose makes device keys with templates of the test's choosing.
func (tok *testToken) provisionLoose(t *testing.T, templates templateFunc) {
	t.Helper()
	d, err := attach(tok.cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.provision(context.Background(), templates); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}
