package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/tpm"
)

// BinEnv is the variable that names a directory with conclaved and conclave.
const BinEnv = "CONCLAVE_BIN"

// Binaries are the two programs.
type Binaries struct {
	Conclaved string // the daemon
	Conclave  string // the command of operators, custodians, services and auditors
}

// In returns the programs in dir.
func In(dir string) (Binaries, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return Binaries{}, err
	}
	b := Binaries{Conclaved: filepath.Join(dir, "conclaved"), Conclave: filepath.Join(dir, "conclave")}
	for _, p := range []string{b.Conclaved, b.Conclave} {
		if _, err := os.Stat(p); err != nil {
			return Binaries{}, fmt.Errorf("%w; build both programs with: make build", err)
		}
	}
	return b, nil
}

// Find returns the programs in the directory that CONCLAVE_BIN names, or builds
// them into a new temporary directory, which remove deletes.
func Find(ctx context.Context) (b Binaries, remove func(), err error) {
	dir, err := os.MkdirTemp("", "conclave-bin")
	if err != nil {
		return b, nil, err
	}
	remove = func() { _ = os.RemoveAll(dir) }
	if b, err = FindIn(ctx, dir); err != nil {
		remove()
		return b, nil, err
	}
	return b, remove, nil
}

// FindIn is Find that builds into a directory of the caller's.
func FindIn(ctx context.Context, dir string) (b Binaries, err error) {
	if dir := os.Getenv(BinEnv); dir != "" {
		return In(dir)
	}
	root, err := moduleRoot()
	if err != nil {
		return b, err
	}
	cmd := exec.CommandContext(ctx, "go", "build", "-o", dir+string(filepath.Separator), "./cmd/...")
	cmd.Dir = root
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		return b, fmt.Errorf("go build ./cmd/...: %w\n%s", err, out.Bytes())
	}
	return In(dir)
}

// moduleRoot is the nearest directory upwards that holds go.mod.
var moduleRoot = sync.OnceValues(func() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		up := filepath.Dir(dir)
		if up == dir {
			return "", errors.New("no go.mod in this directory or above it: set " + BinEnv + " to a directory with conclaved and conclave")
		}
		dir = up
	}
})

// MissingTools names what a development cluster needs and this machine lacks,
// nil if there is everything.
func MissingTools() error {
	_, err := hsm.FindSoftHSM()
	for _, tool := range []string{"swtpm", "swtpm_setup"} {
		if _, lookErr := exec.LookPath(tool); lookErr != nil {
			err = errors.Join(err, fmt.Errorf("%w: %w", tpm.ErrNoSoftTPM, lookErr))
		}
	}
	return err
}
