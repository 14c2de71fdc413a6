package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
)

// rootFile is the post-quantum half of the hardware root, DATA_DIR/root.json:
// the ML-KEM seed wrapped by the device's wrapping key.
type rootFile struct {
	Format  int    `json:"format"` // 1
	Suite   string `json:"suite"`
	Wrapped []byte `json:"wrapped"`
}

func rootPath(dataDir string) string { return filepath.Join(dataDir, "root.json") }

// rootAAD binds the wrapped seed to its node and suite.
func rootAAD(node string, suite pqc.SuiteID) []byte {
	return fmt.Appendf(nil, "conclave/root/v1\x00%s\x00%s", node, suite)
}

// makeRoot draws an ML-KEM seed, wraps it in the device and writes the root
// file. It refuses to replace one.
func makeRoot(ctx context.Context, dev device, cfg Config) (*keyring.Root, error) {
	suite, _ := cfg.Device.suites()
	entropy := make([]byte, pqc.MLKEMSeedSize)
	defer secret.Wipe(entropy)
	if err := dev.Random(ctx, entropy); err != nil {
		return nil, fmt.Errorf("draw the ML-KEM seed: %w", err)
	}
	seed, err := pqc.GenerateSeed(mixed{entropy: bytes.NewReader(entropy)})
	if err != nil {
		return nil, err
	}
	defer seed.Destroy()
	wrapped, err := dev.Wrap(ctx, rootAAD(cfg.Node, suite), seed.Reveal())
	if err != nil {
		return nil, fmt.Errorf("wrap the ML-KEM seed: %w", err)
	}
	b, err := json.MarshalIndent(rootFile{Format: 1, Suite: suite.String(), Wrapped: wrapped}, "", "  ")
	if err != nil {
		return nil, err
	}
	if err := writeNew(rootPath(cfg.DataDir), append(b, '\n'), 0o600); err != nil {
		return nil, err
	}
	return keyring.NewRoot(dev, suite, seed)
}

// loadRoot opens the root file with the device.
func loadRoot(ctx context.Context, dev device, cfg Config) (*keyring.Root, error) {
	b, err := os.ReadFile(rootPath(cfg.DataDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s is missing: this node has not been initialised; run: conclaved init", rootPath(cfg.DataDir))
	}
	if err != nil {
		return nil, err
	}
	var f rootFile
	if err := strictJSON(b, &f); err != nil {
		return nil, fmt.Errorf("%s is damaged: %w; restore it from a backup: without it the node's sealed copies cannot be opened", rootPath(cfg.DataDir), err)
	}
	suite, _ := cfg.Device.suites()
	if f.Format != 1 || f.Suite != suite.String() {
		return nil, fmt.Errorf("%s: format %d, suite %s; this node's device is configured for format 1, suite %s", rootPath(cfg.DataDir), f.Format, f.Suite, suite)
	}
	seed, err := dev.Unwrap(ctx, rootAAD(cfg.Node, suite), f.Wrapped)
	if err != nil {
		return nil, fmt.Errorf("unwrap the ML-KEM seed in %s with the device: %w; it opens only as node %s and with the device that made it; restore the file from a backup if it was altered", rootPath(cfg.DataDir), err, cfg.Node)
	}
	defer seed.Destroy()
	return keyring.NewRoot(dev, suite, seed)
}

// mixed reads the device's randomness XORed with the operating system's, so
// that either being good is enough.
type mixed struct{ entropy io.Reader }

func (m mixed) Read(p []byte) (int, error) {
	n, err := m.entropy.Read(p)
	if err != nil {
		return n, err
	}
	return n, xorRandom(p[:n])
}
