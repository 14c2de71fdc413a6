package tpmtest

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/conclave-kms/conclave/tpm"
)

// manufactured is the state directory of a TPM that was manufactured and never
// started: the content of its files by their relative paths. Manufacture takes
// seconds (RSA endorsement keys), a copy none. It is kept in memory because a
// test process has no moment at which to remove a directory.
type manufactured map[string][]byte

// unused holds those that no living TPM was copied from.
var unused struct {
	sync.Mutex
	list []manufactured
}

// take returns a manufactured TPM for the caller alone, until giveBack.
func take(ctx context.Context) (manufactured, error) {
	unused.Lock()
	if n := len(unused.list); n > 0 {
		m := unused.list[n-1]
		unused.list = unused.list[:n-1]
		unused.Unlock()
		return m, nil
	}
	unused.Unlock()
	return manufacture(ctx)
}

func giveBack(m manufactured) {
	unused.Lock()
	defer unused.Unlock()
	unused.list = append(unused.list, m)
}

func manufacture(ctx context.Context) (manufactured, error) {
	dir, err := os.MkdirTemp("", "ctpm")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	if err := tpm.SetupSoftTPM(ctx, dir); err != nil {
		return nil, err
	}
	m := manufactured{}
	err = filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		name, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		m[name], err = os.ReadFile(path)
		return err
	})
	return m, err
}

// write makes the state directory.
func (m manufactured) write(dir string) error {
	for name, content := range m {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(path, content, 0o600); err != nil {
			return err
		}
	}
	return nil
}
