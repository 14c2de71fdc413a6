package shimtest

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/hsm/hsmtest"
)

// TestShim forwards, fails, hangs and goes on. What kills the process is tested
// where it is a child.
func TestShim(t *testing.T) {
	tok := hsmtest.New(t)
	u, err := hsm.ParseURI(tok.URI)
	if err != nil {
		t.Fatal(err)
	}
	shim := Build(t, u.ModulePath)
	u.ModulePath = shim.Path
	cfg := tok.Config()
	cfg.URI, cfg.CallTimeout = u.String(), 2*time.Second
	tok.Provision(t, cfg)
	d := tok.Open(t, cfg)
	ctx := context.Background()
	digest := make([]byte, 48)
	if _, err := d.Sign(ctx, digest); err != nil {
		t.Fatal(err)
	}
	shim.Fail(t, "C_Sign", 0x30)
	if _, err := d.Sign(ctx, digest); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("CKR_DEVICE_ERROR: %v", err)
	}
	shim.Hang(t, "C_Sign")
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if _, err := d.Sign(short, digest); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a call that hangs: %v", err)
	}
	shim.Behave(t)
	if _, err := d.Sign(ctx, digest); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}
