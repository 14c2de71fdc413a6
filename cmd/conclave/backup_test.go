package main

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms/backup"
)

// Work that takes long is told of until it ends, and not after.
func TestTellSlowly(t *testing.T) {
	r, w := io.Pipe()
	stop := tellSlowly(w, time.Millisecond, func() string { return "half\x1b" })
	line := make([]byte, 16)
	n, err := r.Read(line)
	if err != nil || !strings.HasPrefix(string(line[:n]), `half\x1b`) {
		t.Errorf("%q, %v", line[:n], err)
	}
	r.Close() // so that the next line blocks nobody
	stop()
}

// A backup that is damaged is told from one that is not there by the exit code, and the file is named.
func TestVerifyBackupNamesTheFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "b")
	if err := os.WriteFile(path, []byte("no backup"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := verifyBackup(path, backup.Options{Cluster: strings.Repeat("0", 32)}); exitCode(err) != 6 || !strings.Contains(err.Error(), path) {
		t.Errorf("exit code %d: %v", exitCode(err), err)
	}
	if _, _, err := verifyBackup(path+"x", backup.Options{}); exitCode(err) != 2 {
		t.Errorf("exit code %d: %v", exitCode(err), err)
	}
}
