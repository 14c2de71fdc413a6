package tpmtest

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/conclave-kms/conclave/tpm"
)

// TestCopies holds that TPMs that live side by side are different ones, and that
// one that was used leaves no trace in the next copy.
func TestCopies(t *testing.T) {
	var first []byte
	t.Run("used", func(t *testing.T) {
		a, b := New(t), New(t)
		if bytes.Equal(issuer(t, a), issuer(t, b)) {
			t.Error("two TPMs come from one manufacture")
		}
		if a.Config().Path == b.Config().Path || a.Dir() == b.Dir() {
			t.Errorf("%s, %s", a.Dir(), b.Dir())
		}
		first = issuer(t, b)
		cfg := b.Config()
		cfg.Curve = nil
		b.Open(cfg)
	})
	c := New(t)
	d := New(t)
	if !bytes.Equal(issuer(t, c), first) && !bytes.Equal(issuer(t, d), first) {
		t.Error("a third TPM was manufactured")
	}
	if _, err := tpm.Open(t.Context(), d.Config()); err == nil {
		t.Error("a fresh TPM is provisioned")
	}
}

// issuer is the certificate that every manufacture makes anew and no TPM changes.
func issuer(t *testing.T, p *TPM) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(p.Dir(), "ca", "issuercert.pem"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}
