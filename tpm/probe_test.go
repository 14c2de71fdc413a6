package tpm_test

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"encoding/json"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/tpm"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

// TestProbeFreshTPM holds that a TPM without keys and without an authorization
// file is found fit on either curve, and that nothing stays loaded.
func TestProbeFreshTPM(t *testing.T) {
	p := tpmtest.New(t)
	for _, c := range []ecdh.Curve{ecdh.P384(), ecdh.P256()} {
		cfg := p.Config()
		cfg.AuthFile, cfg.Curve = "", c
		first, err := tpm.Probe(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		b, err := json.MarshalIndent(first, "", " ")
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s", b)
		if !first.Root || first.Reason != "" || first.Keys.Provisioned || len(first.Keys.Missing) < 3 {
			t.Errorf("root %v (%s), keys %+v", first.Root, first.Reason, first.Keys)
		}
		for _, f := range first.Functions {
			if !f.Works || f.Found == "" || f.Use == "" {
				t.Errorf("%+v", f)
			}
		}
		for _, l := range first.Levels {
			if !l.Supported {
				t.Errorf("%+v", l)
			}
		}
		if len(first.Endorsement) != 2 || !first.Endorsement[0].Certificate || first.Endorsement[0].Key != "P-384" {
			t.Errorf("endorsement %+v", first.Endorsement)
		}
		if first.Lockout.OwnerSet || first.Lockout.LockoutSet || first.Lockout.MaxFailures == 0 {
			t.Errorf("lockout %+v", first.Lockout)
		}
		again, err := tpm.Probe(t.Context(), cfg)
		if err != nil || again.Limits != first.Limits {
			t.Errorf("limits %+v became %+v, %v", first.Limits, again.Limits, err)
		}
	}
}

// TestProbeTPMInUse probes while a device has an imported key loaded, which must stay
// usable: neither its session nor its key is flushed.
func TestProbeTPMInUse(t *testing.T) {
	p := tpmtest.New(t)
	if err := tpm.Provision(t.Context(), p.Config()); err != nil {
		t.Fatal(err)
	}
	d := p.Open(p.Config())
	_, public := d.ImportKey()
	key, err := secret.Copy(bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	defer key.Destroy()
	blob, err := tpm.WrapHMAC(public, key, nil)
	if err != nil {
		t.Fatal(err)
	}
	mac, unload, err := d.LoadHMAC(t.Context(), blob)
	if err != nil {
		t.Fatal(err)
	}
	defer unload()
	before, err := mac(t.Context(), []byte("x"))
	if err != nil {
		t.Fatal(err)
	}
	r, err := tpm.Probe(t.Context(), p.Config())
	if err != nil {
		t.Fatal(err)
	}
	signing, err := d.SigningKey().Bytes()
	if err != nil {
		t.Fatal(err)
	}
	if !r.Root || !r.Keys.Provisioned || !bytes.Equal(r.Keys.Signing, signing) || !r.Lockout.OwnerSet {
		t.Errorf("root %v (%s), keys %+v, lockout %+v", r.Root, r.Reason, r.Keys, r.Lockout)
	}
	after, err := mac(t.Context(), []byte("x"))
	if err != nil || !bytes.Equal(after, before) {
		t.Errorf("the key in use: %v", err)
	}

	cfg := p.Config() // other keys than are asked for
	cfg.PCRs = []int{7}
	if r, err := tpm.Probe(t.Context(), cfg); err != nil || r.Root || !strings.Contains(r.Reason, "made without PCRs") {
		t.Errorf("with PCRs: %v, %q, %v", r.Root, r.Reason, err)
	}
	cfg = p.Config()
	cfg.Curve = ecdh.P256()
	if r, err := tpm.Probe(t.Context(), cfg); err != nil || r.Root || !strings.Contains(r.Reason, "P-256") {
		t.Errorf("another curve: %v, %q, %v", r.Root, r.Reason, err)
	}
}

// TestProbePCRs probes a TPM whose keys are bound to registers.
func TestProbePCRs(t *testing.T) {
	p := tpmtest.New(t)
	cfg := p.Config()
	cfg.PCRs = []int{0, 7}
	p.Open(cfg)
	if r, err := tpm.Probe(t.Context(), cfg); err != nil || !r.Root || !r.Keys.Provisioned {
		t.Errorf("%v, %q, %+v, %v", r.Root, r.Reason, r.Keys, err)
	}
	if r, err := tpm.Probe(t.Context(), p.Config()); err != nil || r.Root || !strings.Contains(r.Reason, "made with PCRs") {
		t.Errorf("without the registers: %v, %q, %v", r.Root, r.Reason, err)
	}
}

// TestProbeBusyTPM holds that a TPM that somebody else has hold of is said to be
// busy, and one that is not there to be absent.
func TestProbeBusyTPM(t *testing.T) {
	p := tpmtest.New(t)
	other, err := new(net.Dialer).DialContext(t.Context(), "unix", strings.TrimPrefix(p.Config().Path, "unix:"))
	if err != nil {
		t.Fatal(err)
	}
	cfg := p.Config()
	cfg.CallTimeout = 300 * time.Millisecond
	if _, err := tpm.Probe(t.Context(), cfg); !errors.Is(err, tpm.ErrUnavailable) || !strings.Contains(err.Error(), "another process holds it") {
		t.Errorf("busy: %v", err)
	}
	other.Close()
	cfg.CallTimeout = 0
	if _, err := tpm.Probe(t.Context(), cfg); err != nil {
		t.Errorf("free again: %v", err)
	}
	cfg.Path = "unix:" + filepath.Join(t.TempDir(), "none")
	if _, err := tpm.Probe(t.Context(), cfg); !errors.Is(err, tpm.ErrUnavailable) || strings.Contains(err.Error(), "another process") {
		t.Errorf("absent: %v", err)
	}
	cfg.Path = "/dev/null"
	if _, err := tpm.Probe(t.Context(), cfg); !errors.Is(err, tpm.ErrInvalid) {
		t.Errorf("no TPM: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := tpm.Probe(ctx, p.Config()); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestMeasureTPM(t *testing.T) {
	p := tpmtest.New(t)
	var seen []string
	rates, err := tpm.Measure(t.Context(), p.Config(), 20*time.Millisecond, func(name string) { seen = append(seen, name) })
	if err != nil {
		t.Fatal(err)
	}
	if len(rates) < 5 || len(seen) != len(rates) {
		t.Errorf("%d rates, %d announced", len(rates), len(seen))
	}
	for _, r := range rates {
		t.Logf("%+v", r)
		if r.Problem != "" || r.Count == 0 || r.PerSecond <= 0 {
			t.Errorf("%+v", r)
		}
	}
}
