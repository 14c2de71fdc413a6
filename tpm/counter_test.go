package tpm_test

import (
	"errors"
	"testing"

	"github.com/conclave-kms/conclave/tpm"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

// The counter starts at nothing, only goes up, and survives the TPM's power cuts and
// its own removal: whoever has the owner's authorization cannot turn it back.
func TestCounter(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	cfg := p.Config()
	d := p.Open(cfg)
	ctx := t.Context()
	count := func(want uint64) {
		t.Helper()
		if v, err := d.Count(ctx); err != nil || v != want {
			t.Fatalf("the counter is at %d (%v), want %d", v, err, want)
		}
	}
	if has, err := d.HasCounter(ctx); err != nil || !has {
		t.Fatalf("no counter after Provision: %v", err)
	}
	count(0)
	first, err := d.Increment(ctx)
	if err != nil || first == 0 {
		t.Fatal(first, err)
	}
	count(first)
	for i := range uint64(3) {
		if v, err := d.Increment(ctx); err != nil || v != first+i+1 {
			t.Fatal(v, err)
		}
	}
	p.Kill()
	p.Restart()
	count(first + 3)

	if err := tpm.Apply(ctx, cfg, tpm.UndefineCounter()); err != nil {
		t.Fatal(err)
	}
	if has, err := d.HasCounter(ctx); err != nil || has {
		t.Fatalf("the counter is still there: %v", err)
	}
	if _, err := d.Count(ctx); !errors.Is(err, tpm.ErrNoCounter) {
		t.Errorf("counting without a counter: %v", err)
	}
	if _, err := d.Increment(ctx); !errors.Is(err, tpm.ErrNoCounter) {
		t.Errorf("incrementing no counter: %v", err)
	}
	if err := tpm.Provision(ctx, cfg); err != nil {
		t.Fatalf("adding the counter to a TPM that has the keys: %v", err)
	}
	if err := tpm.Provision(ctx, cfg); !errors.Is(err, tpm.ErrProvisioned) {
		t.Errorf("provisioning a complete TPM: %v", err)
	}
	if v, err := d.Increment(ctx); err != nil || v <= first+3 {
		t.Errorf("a counter made anew goes on at %d after %d: %v", v, first+3, err)
	}
	if n := loaded(t, cfg); n != 0 {
		t.Errorf("%d transient objects and sessions are left", n)
	}
}
