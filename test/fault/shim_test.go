package fault

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/test/harness"
)

// shim is SoftHSM behind the library of testdata/shim.c, which breaks on command.
type shim struct {
	library string
	control string // directory with the commands
}

// buildShim compiles the library into a directory of its own.
func buildShim(t *testing.T, dir string) shim {
	t.Helper()
	module, err := hsm.FindSoftHSM()
	if err != nil {
		t.Fatal(err)
	}
	s := shim{library: filepath.Join(dir, "shim.so"), control: filepath.Join(dir, "control")}
	if err := os.MkdirAll(s.control, 0o700); err != nil {
		t.Fatal(err)
	}
	headers, err := exec.Command("go", "list", "-m", "-f", "{{.Dir}}", "github.com/miekg/pkcs11").Output()
	if err != nil {
		t.Fatalf("where pkcs11.h is: %v", err)
	}
	quoted := func(name, value string) string { return "-D" + name + `="` + value + `"` }
	out, err := exec.Command("cc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-I"+strings.TrimSpace(string(headers)),
		quoted("REAL", module), quoted("CONTROL", s.control), "-o", s.library, "testdata/shim.c", "-ldl", "-lpthread").CombinedOutput()
	if err != nil {
		t.Fatalf("cc: %v\n%s", err, out)
	}
	return s
}

// begin gives the command; end takes it back.
func (s shim) begin(t *testing.T, command string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(s.control, command), nil, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (s shim) end(t *testing.T, command string) {
	t.Helper()
	if err := os.Remove(filepath.Join(s.control, command)); err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
}

// carriedOut waits until the library has done a command that it does once.
func (s shim) carriedOut(t *testing.T, command string) {
	t.Helper()
	err := harness.Within(t.Context(), 15*time.Second, "the library does "+command, func(context.Context) error {
		if _, err := os.Stat(filepath.Join(s.control, command)); err == nil {
			return errors.New("nothing has called it since")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
}
