package interop

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"testing"
)

// findPython returns an interpreter that has the package cryptography: Debian's,
// for which the verifier is written, before any other. Without one the test is
// skipped, and fails under CI=true.
func findPython(t *testing.T) string {
	t.Helper()
	for _, p := range []string{"/usr/bin/python3", "python3"} {
		if exec.Command(p, "-c", "import cryptography").Run() == nil {
			return p
		}
	}
	const missing = "no python3 with the package cryptography; install python3-cryptography (make install-deps)"
	if os.Getenv("CI") == "true" {
		t.Fatal(missing)
	}
	t.Skip(missing)
	return ""
}

// verdict is what the Python verifier says of a file.
type verdict struct {
	Verdict    string   `json:"verdict"`
	Why        string   `json:"why"`
	Proposal   string   `json:"proposal"`
	NotChecked []string `json:"not_checked"`
}

// verifier is a running Python verifier: one process for all files, which remembers
// the signatures that it has verified.
type verifier struct {
	cmd *exec.Cmd
	in  io.WriteCloser
	out *bufio.Reader
}

func startVerifier(t *testing.T) *verifier {
	t.Helper()
	v := &verifier{cmd: exec.CommandContext(t.Context(), findPython(t), "-B", "evidence.py", "--batch")}
	v.cmd.Stderr = os.Stderr
	in, err := v.cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := v.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	v.in, v.out = in, bufio.NewReader(out)
	if err := v.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return v
}

func (v *verifier) ask(t *testing.T, cluster, path string) (r verdict) {
	t.Helper()
	if _, err := fmt.Fprintf(v.in, "%s %s\n", cluster, path); err != nil {
		t.Fatal(err)
	}
	line, err := v.out.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &r)
	}
	if err != nil || r.Verdict != "accept" && r.Verdict != "refuse" {
		t.Fatalf("the Python verifier answered %q: %v", line, err)
	}
	return r
}

// stop ends the process and returns the seconds of processor time that it took.
func (v *verifier) stop(t *testing.T) float64 {
	t.Helper()
	if err := v.in.Close(); err != nil {
		t.Error(err)
	}
	if err := v.cmd.Wait(); err != nil {
		t.Error(err)
	}
	return (v.cmd.ProcessState.UserTime() + v.cmd.ProcessState.SystemTime()).Seconds()
}
