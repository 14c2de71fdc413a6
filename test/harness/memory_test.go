package harness

import (
	"bytes"
	"encoding/hex"
	"os"
	"os/exec"
	"testing"
)

// TestMemoryFinds plants secrets in the memory of another process, one as it is
// and one in hexadecimal, and finds them there, and a third one not.
func TestMemoryFinds(t *testing.T) {
	planted, coded, absent := []byte("a planted secret of 32 bytes ..."), []byte("\xfe\xdc\xba\x98 another one \x01\x02\x03"), []byte("\x10\x20 a secret nobody has \xf0")
	// The shell holds what it has read in a variable.
	cmd := exec.Command("/bin/sh", "-c", `read a; read b; echo ready; read end`)
	in, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); _ = cmd.Wait() })
	text := bytes.Join([][]byte{planted, []byte(hex.EncodeToString(coded)), nil}, []byte("\n"))
	if _, err := in.Write(text); err != nil {
		t.Fatal(err)
	}
	if _, err := out.Read(make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	var s Scanner
	for name, b := range map[string][]byte{"planted": planted, "coded": coded, "absent": absent} {
		if err := s.Add(name, b); err != nil {
			t.Fatal(err)
		}
	}
	p := Process{"the shell", cmd.Process.Pid}
	found, n, err := s.Memory(t.Context(), p)
	if err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, f := range found {
		seen[f.What] = true
	}
	if !seen["planted, as it is"] || !seen["coded, in hexadecimal"] || len(seen) != 2 || n.Bytes < 32<<10 {
		t.Errorf("found %v in %d mappings with %d bytes", found, n.Files, n.Bytes)
	}
	if state, err := processState(p.PID); err != nil || state == 'T' {
		t.Errorf("the process is left in state %q, %v", state, err)
	}
}

func TestProcesses(t *testing.T) {
	found, err := Processes("this", func(parent int, _ string) bool { return parent == os.Getppid() })
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range found {
		if p.PID == os.Getpid() {
			return
		}
	}
	t.Errorf("this process is not among %v", found)
}
