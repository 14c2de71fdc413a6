package fault

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
)

// TestDamagedDisk changes a byte of each kind of file that a node keeps, and opens each to
// others on the machine: the node does not start, and names the file. With the file as it
// was it goes on.
func TestDamagedDisk(t *testing.T) {
	w := cluster(t)
	de := w.c.Nodes["de"]
	name := unique("damage")
	_, err := w.client("de", "operator").CreateKey(t.Context(), "coalition", wire.CreateKeyRequest{Name: name, Purpose: string(kms.Encrypt)})
	w.do(err)
	_, err = w.client("de", "service").Key("coalition", name).Encrypt(t.Context(), wire.EncryptRequest{Plaintext: wire.Secret("x")})
	w.do(err)
	_, _, err = w.c.SameLog(t.Context())
	w.do(err)
	w.do(de.Kill(t.Context()))

	refuses := func(what, path string) {
		t.Helper()
		w.do(de.Launch())
		ctx, cancel := context.WithTimeout(t.Context(), recovery)
		defer cancel()
		if err := de.Process().Ended(ctx); err != nil {
			t.Fatalf("%s: the node goes on: %v\n%s", what, err, de.Says(10))
		}
		if says := de.Says(10); !strings.Contains(says, filepath.Base(path)) {
			t.Errorf("%s: it does not name %s:\n%s", what, path, says)
		}
	}
	for pattern, needle := range map[string]string{
		"raft/raft.db":       name,
		"raft/identity.json": "de-1",
		"access/*.access":    name,
		"cluster-log/*":      name,
	} {
		path, content := find(t, filepath.Join(de.Data, pattern), needle)
		altered := []byte(needle)
		altered[len(altered)/2] ^= 1 // wherever it stands: raft.db keeps pages that are out of use
		w.do(os.WriteFile(path, bytes.ReplaceAll(content, []byte(needle), altered), 0o600))
		refuses("a byte changed", path)
		w.do(os.WriteFile(path, content, 0o600))
		w.do(os.Chmod(path, 0o640))
		refuses("readable by others", path)
		w.do(os.Chmod(path, 0o600))
	}
	w.do(de.Start(t.Context()))
	_, err = w.client("de", "service").Key("coalition", name).Encrypt(t.Context(), wire.EncryptRequest{Plaintext: wire.Secret("x")})
	w.do(err)
}

// find returns the file of a pattern that has the text.
func find(t *testing.T, pattern, needle string) (path string, content []byte) {
	t.Helper()
	paths, err := filepath.Glob(pattern)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range paths {
		if b, err := os.ReadFile(path); err == nil && bytes.Contains(b, []byte(needle)) {
			return path, b
		}
	}
	t.Fatalf("no file %s has %q", pattern, needle)
	return "", nil
}
