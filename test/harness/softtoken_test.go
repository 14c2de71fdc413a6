package harness

import (
	"os"
	"path/filepath"
	"testing"
)

// A token's file that was cut short is put back, one that has changed or is gone is not.
func TestSoftTokens(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "token", "tokens", "x", "token.object")
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	var s softTokens
	holds := func(want string) {
		t.Helper()
		if b, err := os.ReadFile(path); err != nil || string(b) != want {
			t.Fatalf("%q, %v; want %q", b, err, want)
		}
	}
	write := func(content string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	do := func(f func(string) error) {
		t.Helper()
		if err := f(dir); err != nil {
			t.Fatal(err)
		}
	}
	write("whole")
	do(s.keep)
	write("who")
	do(s.keep) // no copy of half a file
	do(s.mend)
	holds("whole")
	write("other")
	do(s.mend)
	holds("other")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	do(s.mend)
	if _, err := os.Stat(path); err == nil {
		t.Fatal("a token that was taken away is back")
	}
}
