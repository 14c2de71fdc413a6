package tlog

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/conclave-kms/conclave/kms"
)

// TestCheck: every leaf is shown, and every file counts.
func TestCheck(t *testing.T) {
	l := leaves(600)
	for _, n := range []int{1, 256, 300, 600} {
		path := filepath.Join(t.TempDir(), "log")
		if err := export(l, n, path); err != nil {
			t.Fatal(err)
		}
		check := func() error {
			h, err := ReadHead(path)
			if err != nil {
				return err
			}
			shown := 0
			err = Check(t.Context(), path, h, func(i uint64, leaf []byte) error {
				if i != uint64(shown) || !bytes.Equal(leaf, l[i]) {
					t.Errorf("leaf %d is shown as number %d", i, shown)
				}
				shown++
				return nil
			})
			if err == nil && shown != n {
				t.Errorf("%d of %d leaves are shown", shown, n)
			}
			return err
		}
		if err := check(); err != nil {
			t.Fatal(err)
		}
		for name, content := range files(t, path) {
			if filepath.Dir(name) == "commands" || filepath.Base(filepath.Dir(filepath.Dir(name))) == "commands" {
				continue // are not of the tree
			}
			file := filepath.Join(path, filepath.FromSlash(name))
			b := []byte(content)
			b[len(b)*2/3] ^= 1
			if err := os.WriteFile(file, b, 0o600); err != nil {
				t.Fatal(err)
			}
			// The signatures under the checkpoint are for others to verify.
			err := checkQuietly(t, path)
			if err == nil && name != "checkpoint" {
				t.Errorf("%d leaves: a changed byte in %s is not noticed", n, name)
			}
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			if err := checkQuietly(t, path); err == nil {
				t.Errorf("%d leaves: %s is not missed", n, name)
			}
			if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := check(); err != nil {
			t.Fatal(err)
		}
	}
}

func checkQuietly(t *testing.T, path string) error {
	h, err := ReadHead(path)
	if err != nil {
		return err
	}
	return Check(t.Context(), path, h, func(uint64, []byte) error { return nil })
}

func TestReadHead(t *testing.T) {
	if _, err := ReadHead(t.TempDir()); !errors.Is(err, kms.NotFound) {
		t.Errorf("no checkpoint: %v", err)
	}
	path := t.TempDir()
	if err := os.WriteFile(filepath.Join(path, checkpointFile), make([]byte, maxNote+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReadHead(path); !errors.Is(err, kms.Invalid) {
		t.Errorf("a long checkpoint: %v", err)
	}
}
