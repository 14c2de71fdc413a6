// Package shimtest compiles a PKCS#11 module for tests that forwards to another
// one and, on command, crashes, hangs or fails in a chosen function.
package shimtest

import (
	_ "embed"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

//go:embed testdata/shim.c
var source []byte

// Shim is a module that misbehaves on command.
type Shim struct {
	Path string // the module, for module-path of a PKCS#11 URI

	trigger string
}

// Build compiles a module in a directory of the test that forwards to the module
// real, which must be a file of its own where several are used in one process (see
// hsm.CopyLibrary). Without a C compiler the test is skipped, or fails when CI=true.
func Build(t testing.TB, real string) *Shim {
	t.Helper()
	cc, err := exec.LookPath("cc")
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("no C compiler (Debian and Ubuntu: apt install gcc)")
		}
		t.Skip("no C compiler (Debian and Ubuntu: apt install gcc)")
	}
	dir := t.TempDir()
	s := &Shim{Path: filepath.Join(dir, "shim.so"), trigger: filepath.Join(dir, "trigger")}
	c := filepath.Join(dir, "shim.c")
	if err := os.WriteFile(c, source, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), cc, "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-Wno-cast-function-type", "-fvisibility=hidden",
		fmt.Sprintf("-DREAL=%q", real), fmt.Sprintf("-DTRIGGER=%q", s.trigger), "-o", s.Path, c, "-ldl").CombinedOutput()
	if err != nil {
		t.Fatalf("compile the shim: %v\n%s", err, out)
	}
	return s
}

// Crash makes the process die by SIGSEGV in the next call of a function, such as
// C_Sign, or of any for "*".
func (s *Shim) Crash(t testing.TB, function string) { s.set(t, "crash "+function) }

// Abort makes the process die by SIGABRT in the next call of a function.
func (s *Shim) Abort(t testing.TB, function string) { s.set(t, "abort "+function) }

// Hang makes calls of a function not return until Behave.
func (s *Shim) Hang(t testing.TB, function string) { s.set(t, "hang "+function) }

// Fail makes calls of a function return a CK_RV without being made.
func (s *Shim) Fail(t testing.TB, function string, rv uint) {
	s.set(t, fmt.Sprintf("fail %s %#x", function, rv))
}

// Behave ends what Crash, Abort, Hang and Fail began. Calls that hang go on.
func (s *Shim) Behave(t testing.TB) {
	t.Helper()
	if err := os.Remove(s.trigger); err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
}

// set replaces the trigger file in one step: a call sees the old one or the new one.
func (s *Shim) set(t testing.TB, line string) {
	t.Helper()
	next := s.trigger + ".next"
	if err := os.WriteFile(next, []byte(line+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(next, s.trigger); err != nil {
		t.Fatal(err)
	}
}
