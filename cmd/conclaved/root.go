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

// rootFile is the post-quantum half of a hardware root: the ML-KEM seed wrapped by
// the device's wrapping key. DATA_DIR/root.json is the present root's,
// DATA_DIR/next-root.json that of the root that is to follow it.
type rootFile struct {
	Format  int    `json:"format"` // 1
	Suite   string `json:"suite"`
	Wrapped []byte `json:"wrapped"`
	Root    uint32 `json:"root"`    // number of the root, 1 at the founding
	Signing string `json:"signing"` // fingerprint of the device's signing key: the device that the file belongs to
}

const firstRoot = 1

func rootPath(dataDir string) string     { return filepath.Join(dataDir, "root.json") }
func nextRootPath(dataDir string) string { return filepath.Join(dataDir, "next-root.json") }
func nextCardPath(dataDir string) string { return filepath.Join(dataDir, "next-node.json") }

// rootAAD binds the wrapped seed to its node and suite.
func rootAAD(node string, suite pqc.SuiteID) []byte {
	return fmt.Appendf(nil, "conclave/root/v1\x00%s\x00%s", node, suite)
}

// onNext is the configuration of the node on its next device.
func (c Config) onNext() Config {
	c.Device, c.NextDevice = *c.NextDevice, nil
	return c
}

// fingerprint names a device by its signing key.
func fingerprint(dev device) (string, error) {
	b, err := dev.SigningKey().Bytes()
	if err != nil {
		return "", err
	}
	return pqc.Fingerprint(b), nil
}

// makeRoot draws an ML-KEM seed, wraps it in the device and writes the root file
// of the root with that number. It refuses to replace a file.
func makeRoot(ctx context.Context, dev device, cfg Config, path string, number uint32) (*keyring.Root, error) {
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
	signing, err := fingerprint(dev)
	if err != nil {
		return nil, err
	}
	f := rootFile{Format: 1, Suite: suite.String(), Wrapped: wrapped, Root: number, Signing: signing}
	if err := writeNew(path, f.bytes(), 0o600); err != nil {
		return nil, err
	}
	return keyring.NewRoot(dev, suite, seed)
}

func (f rootFile) bytes() []byte {
	b, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		panic(err) // strings and numbers
	}
	return append(b, '\n')
}

// readRoot reads a root file. fs.ErrNotExist is in the chain when it is not there.
func readRoot(path string) (rootFile, error) {
	var f rootFile
	b, err := os.ReadFile(path)
	if err != nil {
		return f, err
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm()&0o077 != 0 {
		return f, errors.Join(fmt.Errorf("%s: others can read or change it: chmod 600 it", path), err)
	}
	if err := strictJSON(b, &f); err != nil {
		return f, fmt.Errorf("%s is damaged: %w; restore the file from your copy, or give the node another hardware root (conclaved rekey --help): without it the node's sealed copies cannot be opened", path, err)
	}
	if f.Format != 1 || f.Root < firstRoot || f.Signing == "" {
		return f, fmt.Errorf("%s: format %d, root %d, signing key %q: this is not a root file of format 1", path, f.Format, f.Root, f.Signing)
	}
	return f, nil
}

// readPresentRoot reads root.json, which every initialised node has.
func readPresentRoot(cfg Config) (rootFile, error) {
	f, err := readRoot(rootPath(cfg.DataDir))
	if errors.Is(err, fs.ErrNotExist) {
		return f, fmt.Errorf("%s is missing; for a new node run conclaved init, or conclaved join if the cluster runs already; a node whose data is lost comes back with conclaved recover, or is removed and joins under a new name", rootPath(cfg.DataDir))
	}
	return f, err
}

// loadRoot opens root.json with the device.
func loadRoot(ctx context.Context, dev device, cfg Config) (*keyring.Root, error) {
	f, err := readPresentRoot(cfg)
	if err != nil {
		return nil, err
	}
	return f.open(ctx, dev, cfg, rootPath(cfg.DataDir))
}

// open opens a root file that was read from path with the device of cfg.
func (f rootFile) open(ctx context.Context, dev device, cfg Config, path string) (*keyring.Root, error) {
	suite, _ := cfg.Device.suites()
	if f.Suite != suite.String() {
		return nil, fmt.Errorf("%s: suite %s; the device is configured for suite %s", path, f.Suite, suite)
	}
	own, err := fingerprint(dev)
	if err != nil {
		return nil, err
	}
	if own != f.Signing {
		return nil, fmt.Errorf("%s belongs to the device with signing key %s; this device holds %s", path, f.Signing, own)
	}
	seed, err := dev.Unwrap(ctx, rootAAD(cfg.Node, suite), f.Wrapped)
	if err != nil {
		return nil, fmt.Errorf("unwrap the ML-KEM seed in %s with the device: %w; it opens only as node %s and with the device that made it; restore the file from a backup if it was altered", path, err, cfg.Node)
	}
	defer seed.Destroy()
	return keyring.NewRoot(dev, suite, seed)
}

// adoptFiles makes the next root's files the present root's. The rename of the root
// file is what counts: from then on the node runs on the next device.
func adoptFiles(dataDir string) error {
	err := os.Rename(nextRootPath(dataDir), rootPath(dataDir))
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // not there: done before
		return err
	}
	if err := syncDir(dataDir); err != nil {
		return err
	}
	c, err := readCard(nextCardPath(dataDir))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case err != nil:
		return err
	}
	c.Root, c.Possession = 0, nil
	if err := writeCard(Config{DataDir: dataDir}, c); err != nil {
		return err
	}
	if err := os.Remove(nextCardPath(dataDir)); err != nil {
		return err
	}
	return syncDir(dataDir)
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
