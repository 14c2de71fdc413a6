package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/conclave-kms/conclave/kms/engine"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
)

// checkpointKeyFile is the key by which the node signs checkpoints beside its device: the
// ML-DSA-44 seed wrapped by the device's wrapping key. There is one file for each device,
// DATA_DIR/witness/DEVICE.json named by the fingerprint of its signing key, so that the key goes with the node from one to the next.
type checkpointKeyFile struct {
	Format  int    `json:"format"` // 1
	Wrapped []byte `json:"wrapped"`
	Signing string `json:"signing"` // fingerprint of the device's signing key
}

func witnessDir(dataDir string) string { return filepath.Join(dataDir, "witness") }

func witnessPath(dataDir, signing string) string {
	name := strings.NewReplacer("/", "_", "+", "-", ":", "-").Replace(signing) // of base64's letters
	return filepath.Join(witnessDir(dataDir), name+".json")
}

// witnessAAD binds the wrapped seed to its node and use.
func witnessAAD(node string) []byte { return fmt.Appendf(nil, "conclave/witness/v1\x00%s", node) }

// openWitness opens the node's key for checkpoints with the device that it runs on, or
// makes one where there is none for this device.
func openWitness(ctx context.Context, cfg Config, dev device) (*secret.Bytes, error) {
	signing, err := fingerprint(dev)
	if err != nil {
		return nil, err
	}
	path := witnessPath(cfg.DataDir, signing)
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return makeWitness(ctx, cfg, dev)
	}
	if err != nil {
		return nil, err
	}
	var f checkpointKeyFile
	if err := strictJSON(b, &f); err != nil || f.Format != 1 || f.Signing != signing {
		return nil, errors.Join(fmt.Errorf("%s is damaged or belongs to another device: restore it, or move it away and the node makes another key for checkpoints", path), err)
	}
	seed, err := dev.Unwrap(ctx, witnessAAD(cfg.Node), f.Wrapped)
	if err != nil {
		return nil, fmt.Errorf("unwrap the key for checkpoints in %s with the device: %w", path, err)
	}
	return seed, nil
}

// makeWitness draws a seed from the device and the system.
func makeWitness(ctx context.Context, cfg Config, dev device) (*secret.Bytes, error) {
	entropy := make([]byte, pqc.MLDSA44SeedSize)
	defer secret.Wipe(entropy)
	if err := dev.Random(ctx, entropy); err != nil {
		return nil, fmt.Errorf("draw the key for checkpoints: %w", err)
	}
	seed, err := pqc.GenerateMLDSA44Seed(mixed{entropy: bytes.NewReader(entropy)})
	if err != nil {
		return nil, err
	}
	if err := keepWitness(ctx, cfg, dev, seed); err != nil {
		seed.Destroy()
		return nil, err
	}
	return seed, nil
}

// keepWitness writes the file of a device, unless it is there.
func keepWitness(ctx context.Context, cfg Config, dev device, seed *secret.Bytes) error {
	signing, err := fingerprint(dev)
	if err != nil {
		return err
	}
	path := witnessPath(cfg.DataDir, signing)
	if _, err := os.Stat(path); err == nil {
		return nil
	}
	if err := os.MkdirAll(witnessDir(cfg.DataDir), 0o700); err != nil {
		return err
	}
	wrapped, err := dev.Wrap(ctx, witnessAAD(cfg.Node), seed.Reveal())
	if err != nil {
		return fmt.Errorf("wrap the key for checkpoints: %w", err)
	}
	b, err := json.MarshalIndent(checkpointKeyFile{Format: 1, Wrapped: wrapped, Signing: signing}, "", "  ")
	if err != nil {
		return err
	}
	return replaceFile(path, append(b, '\n'), 0o600)
}

// openCheckpoints opens what the node takes part in checkpoints with.
func (n *node) openCheckpoints(ctx context.Context) (*engine.Checkpoints, error) {
	seed, err := openWitness(ctx, n.cfg, n.device)
	if err != nil {
		return nil, err
	}
	n.witness = seed
	n.closeLater(func() error { seed.Destroy(); return nil })
	key, err := pqc.NewMLDSA44Key(seed)
	if err != nil {
		return nil, err
	}
	n.closeLater(func() error { key.Destroy(); return nil })
	seen, err := openSeen(filepath.Join(witnessDir(n.cfg.DataDir), "seen.json"))
	if err != nil {
		return nil, err
	}
	return &engine.Checkpoints{Key: key, Seen: seen, Access: n.access, Cluster: n.clusterLog, Marks: n.marks}, nil
}

// seenFile is the node's own memory of what it has cosigned. It is replaced as a
// whole: a few hundred bytes for each log.
type seenFile struct {
	path string

	mu   sync.Mutex
	logs map[string]seenHead
}

type seenHead struct {
	Size uint64 `json:"size"`
	Root []byte `json:"root"`
}

func openSeen(path string) (*seenFile, error) {
	s := &seenFile{path: path, logs: map[string]seenHead{}}
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err == nil {
		err = strictJSON(b, &s.logs)
	}
	if err != nil {
		return nil, fmt.Errorf("%s, which remembers what this node has cosigned, cannot be read: %w; restore it from a copy, or move it away if the other sites agree with the logs as they are", path, err)
	}
	return s, nil
}

// Get implements engine.Seen.
func (s *seenFile) Get(origin string) (uint64, []byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.logs[origin]
	return h.Size, h.Root, nil
}

// Put implements engine.Seen.
func (s *seenFile) Put(origin string, size uint64, root []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h := s.logs[origin]; h.Size == size && bytes.Equal(h.Root, root) {
		return nil
	}
	next := make(map[string]seenHead, len(s.logs)+1)
	for o, h := range s.logs {
		next[o] = h
	}
	next[origin] = seenHead{size, root}
	b, err := json.MarshalIndent(next, "", " ")
	if err != nil {
		return err
	}
	if err := replaceFile(s.path, append(b, '\n'), 0o600); err != nil {
		return err
	}
	s.logs = next
	return nil
}
