package hsm_test

import (
	"context"
	"crypto/ecdh"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/hsm/hsmtest"
)

// files lists the token's objects on disk.
func files(t *testing.T, tok *hsmtest.Token) (n int) {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(tok.Tokens, "*", "*.object"))
	if err != nil {
		t.Fatal(err)
	}
	return len(found)
}

func function(t *testing.T, r hsm.ProbeReport, name string) hsm.ProbeFunction {
	t.Helper()
	for _, f := range r.Functions {
		if f.Name == name {
			return f
		}
	}
	t.Fatalf("the report has no %q", name)
	return hsm.ProbeFunction{}
}

// TestProbeFreshToken holds that a token without keys is found fit, that each of the
// findings about SoftHSM that DEVICES.md measured comes out, and that nothing stays.
func TestProbeFreshToken(t *testing.T) {
	for _, c := range []ecdh.Curve{ecdh.P384(), ecdh.P256()} {
		tok := hsmtest.New(t)
		cfg := tok.Config()
		cfg.Curve = c
		before := files(t, tok)
		r, err := hsm.Probe(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.MarshalIndent(r, "", " ")
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s", b)
		if after := files(t, tok); after != before {
			t.Errorf("the probe left %d objects in the token", after-before)
		}
		if !r.Root || r.Reason != "" || r.Profile != "SoftHSM" || r.Keys.Provisioned || len(r.Keys.Missing) != 3 || r.Keys.Problem != "" {
			t.Errorf("root %v (%s), profile %q, keys %+v", r.Root, r.Reason, r.Profile, r.Keys)
		}
		if len(r.Levels) != 2 || !r.Levels[0].Supported || !r.Levels[1].Supported {
			t.Errorf("levels %+v", r.Levels)
		}
		for _, f := range r.Functions {
			if f.Needed && !f.Works || f.Found == "" || f.Use == "" {
				t.Errorf("%+v", f)
			}
		}
		for name, works := range map[string]bool{
			"ECDH, CKD_SHA256_KDF": false, "AES-KWP, PKCS#11 3.0": false, "AES-KWP, older number": true, "RSA-OAEP, SHA-1": true,
			"RSA-OAEP, SHA-256": false, "Ed25519": true, "import of a P-384 key": true,
		} {
			if f := function(t, r, name); f.Works != works {
				t.Errorf("%+v", f)
			}
		}
		for _, q := range []string{"CKA_SENSITIVE", "reads 0", "CKR_GENERAL_ERROR"} {
			if !strings.Contains(strings.Join(r.Quirks, "\n"), q) {
				t.Errorf("no quirk %q in %q", q, r.Quirks)
			}
		}
	}
}

// TestProbeTokenInUse probes a provisioned token while a device has it open.
func TestProbeTokenInUse(t *testing.T) {
	tok := hsmtest.New(t)
	tok.Provision(t, tok.Config())
	d := tok.Open(t, tok.Config())
	before := files(t, tok)
	r, err := hsm.Probe(t.Context(), tok.Config())
	if err != nil {
		t.Fatal(err)
	}
	point, err := d.SigningKey().Bytes()
	if err != nil {
		t.Fatal(err)
	}
	if !r.Root || !r.Keys.Provisioned || string(r.Keys.Signing) != string(point) {
		t.Errorf("root %v (%s), keys %+v", r.Root, r.Reason, r.Keys)
	}
	if err := d.Check(t.Context()); err != nil {
		t.Errorf("the device in use: %v", err)
	}
	if files(t, tok) != before {
		t.Error("the probe changed the token")
	}

	cfg := tok.Config() // provisioned on another curve than is asked for
	cfg.Curve = ecdh.P256()
	r, err = hsm.Probe(t.Context(), cfg)
	if err != nil || r.Root || !strings.Contains(r.Reason, "another curve") {
		t.Errorf("%v, %q, %v", r.Root, r.Reason, err)
	}
}

func TestProbeRefusals(t *testing.T) {
	tok := hsmtest.New(t)
	wrong := tok.Config()
	wrong.PINFile = filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(wrong.PINFile, []byte("000000"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := hsm.Probe(t.Context(), wrong); !errors.Is(err, hsm.ErrPIN) {
		t.Errorf("a wrong PIN: %v", err)
	}
	absent := tok.Config()
	absent.URI = strings.Replace(absent.URI, tok.Label, "none", 1)
	if _, err := hsm.Probe(t.Context(), absent); !errors.Is(err, hsm.ErrTokenNotFound) {
		t.Errorf("no such token: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := hsm.Probe(ctx, tok.Config()); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestMeasure measures a fresh and a provisioned token for a moment each.
func TestMeasure(t *testing.T) {
	tok := hsmtest.New(t)
	for _, provisioned := range []bool{false, true} {
		if provisioned {
			tok.Provision(t, tok.Config())
		}
		before := files(t, tok)
		var seen []string
		rates, err := hsm.Measure(t.Context(), tok.Config(), 20*time.Millisecond, func(name string) { seen = append(seen, name) })
		if err != nil {
			t.Fatal(err)
		}
		if len(rates) < 10 || len(seen) != len(rates) {
			t.Errorf("%d rates, %d announced", len(rates), len(seen))
		}
		for _, r := range rates {
			if r.Problem != "" || r.Count == 0 || r.PerSecond <= 0 || r.Sessions < 1 {
				t.Errorf("%+v", r)
			}
		}
		if files(t, tok) != before {
			t.Error("measuring changed the token")
		}
	}
}
