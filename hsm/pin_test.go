package hsm

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/miekg/pkcs11"
)

// writePIN replaces a PIN file and makes it look as if that was a while ago.
func writePIN(t *testing.T, path, pin string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(pin+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	past := time.Now().Add(-time.Minute)
	if err := os.Chtimes(path, past, past); err != nil {
		t.Fatal(err)
	}
}

// setPIN changes the user PIN in the token, as its administrator would, and ends
// all sessions.
func (d *Device) setPIN(t *testing.T, old, pin string) {
	t.Helper()
	err := d.mod.alone(t.Context(), func() error {
		slot, _, err := findSlot(d.mod.p11, d.set.uri)
		if err != nil {
			return err
		}
		h, err := d.mod.p11.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		if err != nil {
			return err
		}
		if err := d.mod.p11.SetPIN(h, old, pin); err != nil {
			return err
		}
		return d.mod.p11.CloseAllSessions(slot)
	})
	if err != nil {
		t.Fatal(err)
	}
}

// TestPINChanged: a PIN that was changed in the token is refused once and never
// sent again; another one in the file is taken without a restart.
func TestPINChanged(t *testing.T) {
	tok, first := openNew(t)
	old := string(tok.cfg.PIN.Reveal())
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	cfg := tok.cfg
	cfg.PIN, cfg.PINFile = nil, filepath.Join(t.TempDir(), "pin")
	writePIN(t, cfg.PINFile, old)
	d := (&testToken{cfg: cfg}).open(t)
	d.setPIN(t, old, "a-new-pin")
	for range 3 {
		err := d.Check(t.Context())
		if !errors.Is(err, ErrPIN) || !strings.Contains(err.Error(), cfg.PINFile) || strings.Contains(err.Error(), old) {
			t.Fatal(err)
		}
	}
	writePIN(t, cfg.PINFile, "wrong-too")
	if err := d.Check(t.Context()); !errors.Is(err, ErrPIN) {
		t.Fatal(err)
	}
	// The first one is right again in the token, but it was refused: a file that
	// holds it must not have it sent.
	d.setPIN(t, "a-new-pin", old)
	writePIN(t, cfg.PINFile, old)
	if err := d.Check(t.Context()); !errors.Is(err, ErrPIN) {
		t.Fatalf("a refused PIN was sent again: %v", err)
	}
	d.setPIN(t, old, "the-third-pin")
	writePIN(t, cfg.PINFile, "the-third-pin")
	if err := d.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	useAll(t, d)
}

// TestPINFileSettles: a file that is being written is left alone.
func TestPINFileSettles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pin")
	writePIN(t, path, "1234")
	p, err := Config{PINFile: path}.userPIN(&URI{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.destroy()
	refused := p.refuse(pkcs11.Error(pkcs11.CKR_PIN_INCORRECT))
	if err := p.renew(); err != refused {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("56"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := p.renew(); err != refused {
		t.Fatalf("a file just written: %v", err)
	}
	writePIN(t, path, "5678")
	if err := p.renew(); err != nil || string(p.now.Reveal()) != "5678" {
		t.Fatal(err)
	}
	for i := range maxRefused + 2 {
		p.refuse(pkcs11.Error(pkcs11.CKR_PIN_INCORRECT))
		writePIN(t, path, "more-"+strings.Repeat("x", i))
		err = p.renew()
	}
	if !errors.Is(err, ErrPIN) || len(p.spent) != maxRefused {
		t.Fatalf("%d refused PINs: %v", len(p.spent), err)
	}
}

// TestPINOnce: a PIN that cannot be read again stays refused.
func TestPINOnce(t *testing.T) {
	pin, err := secret.Copy([]byte("1234"))
	if err != nil {
		t.Fatal(err)
	}
	defer pin.Destroy()
	p, err := Config{PIN: pin}.userPIN(&URI{})
	if err != nil {
		t.Fatal(err)
	}
	defer p.destroy()
	refused := p.refuse(pkcs11.Error(pkcs11.CKR_PIN_INCORRECT))
	if err := p.renew(); err != refused || !strings.Contains(err.Error(), "start anew") {
		t.Fatal(err)
	}
}
