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
		if bytes.Equal(permanent(t, a), permanent(t, b)) {
			t.Error("two TPMs have one state")
		}
		if a.Config().Path == b.Config().Path || a.Dir() == b.Dir() {
			t.Errorf("%s, %s", a.Dir(), b.Dir())
		}
		first = permanent(t, b) // its manufacture is given back first and taken last
		cfg := b.Config()
		cfg.Curve = nil
		b.Open(cfg)
	})
	c := New(t)
	d := New(t)
	if !bytes.Equal(permanent(t, c), first) && !bytes.Equal(permanent(t, d), first) {
		t.Error("no TPM starts from the state that was manufactured")
	}
	if _, err := tpm.Open(t.Context(), d.Config()); err == nil {
		t.Error("a fresh TPM is provisioned")
	}
}

// permanent is the state of a TPM as it was before its first command.
func permanent(t *testing.T, p *TPM) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(p.Dir(), "tpm2-00.permall"))
	if err != nil {
		t.Fatal(err)
	}
	return b
}
