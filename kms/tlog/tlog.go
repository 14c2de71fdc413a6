// Package tlog makes and checks what third parties need of a transparency log:
// RFC 6962 inclusion and consistency proofs, the tiles of the C2SP tlog-tiles
// specification (https://c2sp.org/tlog-tiles), and a plain directory of them that
// any static file server can serve.
package tlog

import (
	"crypto/sha256"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/proof"
	"github.com/transparency-dev/merkle/rfc6962"

	"github.com/conclave-kms/conclave/kms"
)

const (
	// HashSize is the length of every hash, in bytes (SHA-256).
	HashSize = sha256.Size

	// TileWidth is the number of hashes in a full tile, and of entries in a full bundle.
	TileWidth = 256

	// MaxLeaf is the longest leaf that an entry bundle can hold, in bytes.
	MaxLeaf = 1<<16 - 1

	tileHeight = 8 // levels of the Merkle tree in a tile
	levels     = 8 // of tiles, in a tree of less than 2^64 leaves
)

// Source is a log that proofs and tiles are made from. It may grow meanwhile; what
// it has once returned does not change.
type Source interface {
	// Size returns the number of leaves.
	Size() uint64
	// Hashes returns n hashes of a tile level, 32 bytes each, beginning with number
	// from: number i of level l is the root of the leaves i*256^l to (i+1)*256^l - 1,
	// which must all exist.
	Hashes(level uint, from, n uint64) ([][]byte, error)
	// Leaves returns n leaves, beginning with number from.
	Leaves(from uint64, n int) ([][]byte, error)
}

// hashes asks the source and holds it to its contract.
func hashes(s Source, level uint, from, n uint64) ([][]byte, error) {
	h, err := s.Hashes(level, from, n)
	if err != nil {
		return nil, err
	}
	if uint64(len(h)) != n {
		return nil, kms.Errorf(kms.Internal, "the log returned %d hashes in place of %d", len(h), n)
	}
	if err := checkLengths(h); err != nil {
		return nil, err
	}
	return h, nil
}

func checkLengths(hashes [][]byte) error {
	for _, h := range hashes {
		if len(h) != HashSize {
			return kms.Errorf(kms.Invalid, "a hash has %d bytes, not %d", len(h), HashSize)
		}
	}
	return nil
}

func hashChildren(left, right []byte) []byte { return rfc6962.DefaultHasher.HashChildren(left, right) }

// node returns the hash of a complete subtree.
func node(s Source, id compact.NodeID) ([]byte, error) {
	within := id.Level % tileHeight
	h, err := hashes(s, id.Level/tileHeight, id.Index<<within, 1<<within)
	if err != nil {
		return nil, err
	}
	for len(h) > 1 {
		for i := range len(h) / 2 {
			h[i] = hashChildren(h[2*i], h[2*i+1])
		}
		h = h[:len(h)/2]
	}
	return h[0], nil
}

func nodes(s Source, ids []compact.NodeID) ([][]byte, error) {
	h := make([][]byte, len(ids))
	for i, id := range ids {
		var err error
		if h[i], err = node(s, id); err != nil {
			return nil, err
		}
	}
	return h, nil
}

func checkSize(s Source, n uint64) error {
	if size := s.Size(); n > size {
		return kms.Errorf(kms.Invalid, "the log has %d leaves, not %d", size, n)
	}
	return nil
}

// Root returns the RFC 6962 root of the first n leaves, 32 bytes. Errors: kms.Invalid
// for more leaves than there are, and those of the source.
func Root(s Source, n uint64) ([]byte, error) {
	if err := checkSize(s, n); err != nil {
		return nil, err
	}
	if n == 0 {
		return rfc6962.DefaultHasher.EmptyRoot(), nil
	}
	h, err := nodes(s, compact.RangeNodes(0, n, nil))
	if err != nil {
		return nil, err
	}
	root := h[len(h)-1]
	for i := len(h) - 2; i >= 0; i-- {
		root = hashChildren(h[i], root)
	}
	return root, nil
}

// Inclusion returns the proof (RFC 6962 section 2.1.1) that leaf i is in the tree
// of the first n leaves. Errors: kms.Invalid for numbers out of range, and those
// of the source.
func Inclusion(s Source, i, n uint64) ([][]byte, error) {
	if err := checkSize(s, n); err != nil {
		return nil, err
	}
	p, err := proof.Inclusion(i, n)
	return prove(s, p, err)
}

// Consistency returns the proof (RFC 6962 section 2.1.2) that the first m leaves
// are the beginning of the first n. Errors as for Inclusion.
func Consistency(s Source, m, n uint64) ([][]byte, error) {
	if err := checkSize(s, n); err != nil {
		return nil, err
	}
	p, err := proof.Consistency(m, n)
	return prove(s, p, err)
}

func prove(s Source, p proof.Nodes, err error) ([][]byte, error) {
	if err != nil {
		return nil, kms.Wrap(kms.Invalid, err, "there is no such proof", "")
	}
	h, err := nodes(s, p.IDs)
	if err != nil {
		return nil, err
	}
	if h, err = p.Rehash(h, hashChildren); err != nil {
		return nil, kms.Wrap(kms.Internal, err, "the proof cannot be put together", "")
	}
	return h, nil
}

// VerifyInclusion checks that the leaf with this hash is number i in the tree of n
// leaves with this root. Errors: kms.Invalid.
func VerifyInclusion(i, n uint64, leafHash []byte, p [][]byte, root []byte) error {
	if err := checkLengths(append([][]byte{leafHash, root}, p...)); err != nil {
		return err
	}
	if err := proof.VerifyInclusion(rfc6962.DefaultHasher, i, n, leafHash, p, root); err != nil {
		return kms.Errorf(kms.Invalid, "the proof does not show that leaf %d is in the log of %d leaves", i, n)
	}
	return nil
}

// VerifyConsistency checks that the tree of m leaves with root1 is the beginning of
// the one of n leaves with root2. Errors: kms.Invalid.
func VerifyConsistency(m, n uint64, p [][]byte, root1, root2 []byte) error {
	if err := checkLengths(append([][]byte{root1, root2}, p...)); err != nil {
		return err
	}
	// The library takes any root for that of no leaves.
	if m == 0 && string(root1) != string(rfc6962.DefaultHasher.EmptyRoot()) ||
		proof.VerifyConsistency(rfc6962.DefaultHasher, m, n, p, root1, root2) != nil {
		return kms.Errorf(kms.Invalid, "the proof does not show that the log of %d leaves is the beginning of the one of %d", m, n)
	}
	return nil
}
