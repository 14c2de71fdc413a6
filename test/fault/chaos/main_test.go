package chaos

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/conclave-kms/conclave/test/harness"
)

// Variables that `make fault` sets.
const (
	minutesEnv = "CONCLAVE_FAULT_MINUTES" // of TestChaos; default 2
	turnsEnv   = "CONCLAVE_FAULT_TURNS"   // rotations of TestRotations; default 6
	seedEnv    = "CONCLAVE_FAULT_SEED"    // of the faults and the load; default: the time
	killsEnv   = "CONCLAVE_FAULT_KILLS"   // of TestFailover; default 8
)

// programs are built once for all tests.
type programs struct {
	harness.Binaries
	changed string // conclaved with the changes of changed.go
}

var built = sync.OnceValues(func() (p programs, err error) {
	dir, err := os.MkdirTemp("", "conclave-chaos")
	if err != nil {
		return p, err
	}
	made = append(made, dir)
	if p.Binaries, err = harness.FindIn(context.Background(), dir); err == nil {
		p.changed, err = changed.Build(context.Background(), filepath.Join(dir, "changed"))
	}
	return p, err
})

func TestMain(m *testing.M) {
	code := m.Run()
	for _, dir := range made {
		if err := os.RemoveAll(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}
	os.Exit(code)
}

// made are the directories of the programs.
var made []string

// need skips the test, or fails it when CI=true, where this machine lacks a tool.
func need(t *testing.T) programs {
	t.Helper()
	err := harness.MissingTools()
	if testing.Short() {
		err = errors.Join(err, errors.New("fault tests are not short"))
	}
	switch {
	case err == nil:
	case os.Getenv("CI") == "true":
		t.Fatal(err)
	default:
		t.Skip(err)
	}
	p, err := built()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// number reads a number from the environment.
func number(t *testing.T, name string, missing uint64) (n uint64) {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return missing
	}
	if _, err := fmt.Sscan(text, &n); err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}
