package cluster

import (
	"context"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
)

// SnapshotContext is the signature context (pqc.Verify) under which a node's
// device signs the hash of a state that the node has applied itself.
const SnapshotContext = "conclave/snapshot/v1"

const (
	keepSignatures = 16 // newest signatures kept; more than snapshots are
	signTimeout    = time.Minute
)

// trust keeps the device's signatures over hashes of states that this node has
// applied or verified, one small file for each.
type trust struct {
	ctx     context.Context // of the node's life
	dir     string
	cluster string
	node    string
	suite   pqc.SuiteID // of the signing key in the device
	signing []byte      // its public half
	signer  func(ctx context.Context, digest []byte) ([]byte, error)
}

// newTrust is the trust of the node self of the genesis.
func newTrust(ctx context.Context, cfg Config, self state.Node, cluster, dir string) *trust {
	t := &trust{ctx: ctx, dir: dir, cluster: cluster, node: cfg.NodeID, suite: pqc.SuiteID(cfg.SigningSuite), signing: cfg.Signing, signer: cfg.Sign}
	if cfg.Signing == nil {
		t.suite, t.signing = pqc.SuiteID(self.SigningSuite), self.Signing
	}
	return t
}

// statement is what the device signs.
type snapshotStatement struct {
	Cluster string `cbor:"cluster"`
	Node    string `cbor:"node"`
	Hash    []byte `cbor:"hash"`
}

func (t *trust) message(hash [32]byte) []byte {
	return canon.Marshal(snapshotStatement{Cluster: t.cluster, Node: t.node, Hash: hash[:]})
}

func (t *trust) path(hash [32]byte) string {
	return filepath.Join(t.dir, hex.EncodeToString(hash[:])+".sig")
}

// sign has the device sign a hash and stores the signature.
func (t *trust) sign(hash [32]byte) error {
	digest, err := pqc.Digest(t.suite, t.message(hash), []byte(SnapshotContext))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(t.ctx, signTimeout)
	defer cancel()
	sig, err := t.signer(ctx, digest)
	if err != nil {
		return err
	}
	if err := pqc.Verify(t.suite, t.signing, t.message(hash), []byte(SnapshotContext), sig); err != nil {
		return err // the device's key is not the one it is said to be
	}
	if err := writeFile(t.path(hash), sig); err != nil {
		return err
	}
	return t.prune()
}

// signed reports whether this node's device has signed the hash. Anything amiss
// means no.
func (t *trust) signed(hash [32]byte) bool {
	sig, err := os.ReadFile(t.path(hash))
	if err != nil {
		return false
	}
	return pqc.Verify(t.suite, t.signing, t.message(hash), []byte(SnapshotContext), sig) == nil
}

// prune removes all but the newest signatures.
func (t *trust) prune() error {
	entries, err := os.ReadDir(t.dir)
	if err != nil {
		return err
	}
	type file struct {
		name string
		time time.Time
	}
	var files []file
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			continue // removed meanwhile
		}
		files = append(files, file{e.Name(), info.ModTime()})
	}
	slices.SortFunc(files, func(a, b file) int { return b.time.Compare(a.time) })
	var errs []error
	for _, f := range files[min(keepSignatures, len(files)):] {
		errs = append(errs, os.Remove(filepath.Join(t.dir, f.name)))
	}
	return errors.Join(errs...)
}
