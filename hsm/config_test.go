package hsm

import (
	"context"
	"crypto/ecdh"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms/secret"
	"golang.org/x/sys/unix"
)

func TestSettingsRefuse(t *testing.T) {
	good := Config{URI: "pkcs11:token=t?module-path=/m.so"}
	if _, err := good.settings(); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]func(*Config){
		"no URI":        func(c *Config) { c.URI = "" },
		"no token":      func(c *Config) { c.URI = "pkcs11:slot-id=1?module-path=/m.so" },
		"no module":     func(c *Config) { c.URI = "pkcs11:token=t" },
		"curve":         func(c *Config) { c.Curve = ecdh.X25519() },
		"P-521":         func(c *Config) { c.Curve = ecdh.P521() },
		"long label":    func(c *Config) { c.Label = strings.Repeat("x", 21) },
		"odd label":     func(c *Config) { c.Label = "a\nb" },
		"timeout":       func(c *Config) { c.CallTimeout = -time.Second },
		"sessions":      func(c *Config) { c.MaxSessions = -1 },
		"many sessions": func(c *Config) { c.MaxSessions = 5000 },
	} {
		c := good
		change(&c)
		if _, err := c.settings(); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func writeFile(t *testing.T, content string, mode os.FileMode) string {
	t.Helper()
	p := filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(p, []byte(content), mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(p, mode); err != nil { // whatever the umask
		t.Fatal(err)
	}
	return p
}

func TestReadPIN(t *testing.T) {
	for content, want := range map[string]string{
		"1234": "1234", "1234\n": "1234", "1234\r\n": "1234", "12 34\n\n": "12 34\n",
		strings.Repeat("x", maxPIN) + "\n": strings.Repeat("x", maxPIN),
	} {
		got, err := Config{PINFile: writeFile(t, content, 0o600)}.readPIN(&URI{})
		if err != nil {
			t.Fatalf("%q: %v", content, err)
		}
		if string(got.Reveal()) != want {
			t.Errorf("%q read wrongly", content)
		}
		got.Destroy()
	}
	for _, content := range []string{"", "\n", "12\x0034", strings.Repeat("7", maxPIN+1), strings.Repeat("7", 5000)} {
		_, err := Config{PINFile: writeFile(t, content, 0o600)}.readPIN(&URI{})
		if !errors.Is(err, ErrPIN) {
			t.Errorf("PIN of %d bytes: %v", len(content), err)
		} else if strings.Contains(err.Error(), strings.Repeat("7", 20)) {
			t.Error("the error shows the PIN")
		}
	}
	if _, err := (Config{PINFile: writeFile(t, "1234", 0o644)}).readPIN(&URI{}); !errors.Is(err, ErrPIN) {
		t.Errorf("a PIN file that everybody reads: %v", err)
	}
	if _, err := (Config{PINFile: "/nonexistent"}).readPIN(&URI{}); !errors.Is(err, ErrPIN) {
		t.Errorf("missing PIN file: %v", err)
	}
	u, err := ParseURI("pkcs11:token=t?pin-source=file:" + writeFile(t, "4321\n", 0o600))
	if err != nil {
		t.Fatal(err)
	}
	got, err := Config{}.readPIN(u)
	if err != nil || string(got.Reveal()) != "4321" {
		t.Errorf("pin-source: %v", err)
	}
	got.Destroy()
}

func TestPINSources(t *testing.T) {
	pin, err := secret.Copy([]byte("1234"))
	if err != nil {
		t.Fatal(err)
	}
	defer pin.Destroy()
	for name, c := range map[string]Config{
		"none": {}, "two": {PIN: pin, PINFile: "/x"}, "stdin": {PINFD: 1}, "negative": {PINFD: -4},
	} {
		if _, err := c.readPIN(&URI{}); !errors.Is(err, ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := (Config{PINFile: "/x"}).readPIN(&URI{PINSource: "/y"}); !errors.Is(err, ErrInvalid) {
		t.Errorf("PIN file and pin-source: %v", err)
	}
}

func TestPINFromDescriptor(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.WriteString("from a pipe\n"); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Dup(int(r.Fd())) // readPIN closes what it is given
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	got, err := Config{PINFD: fd}.readPIN(&URI{})
	if err != nil {
		t.Fatal(err)
	}
	defer got.Destroy()
	if string(got.Reveal()) != "from a pipe" {
		t.Fatal("another PIN was read")
	}
}

func TestModuleErrors(t *testing.T) {
	pin := writeFile(t, "1234", 0o600)
	_, err := Open(context.Background(), Config{URI: "pkcs11:token=t?module-path=/nonexistent/lib.so", PINFile: pin})
	if !errors.Is(err, ErrModule) || !strings.Contains(err.Error(), "/nonexistent/lib.so") || !strings.Contains(err.Error(), "softhsm2") {
		t.Errorf("missing library: %v", err)
	}
	_, err = Open(context.Background(), Config{URI: "pkcs11:token=t?module-path=" + pin, PINFile: pin})
	if !errors.Is(err, ErrModule) {
		t.Errorf("not a library: %v", err)
	}
	t.Setenv("SOFTHSM2_MODULE", "/nonexistent/lib.so")
	if _, err := FindSoftHSM(); !errors.Is(err, ErrModule) {
		t.Errorf("SOFTHSM2_MODULE: %v", err)
	}
}
