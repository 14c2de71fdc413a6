package audit

import (
	"crypto/sha256"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"
)

// Tree is the size and root of an RFC 6962 Merkle tree (SHA-256).
type Tree struct {
	Size uint64
	Root []byte // 32 bytes
}

// LeafHash returns the RFC 6962 hash of a leaf.
func LeafHash(leaf []byte) []byte {
	h := leafHash(leaf)
	return h[:]
}

// leafHash allocates nothing for a leaf of usual length.
func leafHash(leaf []byte) [sha256.Size]byte {
	var usual [768]byte
	return sha256.Sum256(append(append(usual[:0], rfc6962.RFC6962LeafHashPrefix), leaf...))
}

// hashChildren is HashChildren of rfc6962.DefaultHasher with one allocation.
func hashChildren(left, right []byte) []byte {
	var b [1 + 2*sha256.Size]byte
	b[0] = rfc6962.RFC6962NodeHashPrefix
	copy(b[1:], left)
	copy(b[1+sha256.Size:], right)
	h := sha256.Sum256(b[:])
	return h[:]
}

// merkle is a growing tree of which the right border is kept, and by tiles, where
// there are any, what proofs need.
type merkle struct {
	factory *compact.RangeFactory
	r       *compact.Range
	tiles   *tiles
	visit   compact.VisitFn
}

func newMerkle(t *tiles) merkle {
	f := &compact.RangeFactory{Hash: hashChildren}
	m := merkle{factory: f, r: f.NewEmptyRange(0), tiles: t}
	if t != nil {
		m.visit = t.take
	}
	return m
}

func (m merkle) append(leafHash []byte) {
	if m.tiles != nil {
		m.tiles.mu.Lock()
		defer m.tiles.mu.Unlock()
	}
	if err := m.r.Append(leafHash, m.visit); err != nil {
		panic("audit: a compact range takes one more leaf: " + err.Error()) // impossible: it fails on no input
	}
}

func (m merkle) tree() Tree {
	size := m.r.End()
	if size == 0 {
		return Tree{Root: rfc6962.DefaultHasher.EmptyRoot()}
	}
	root, err := m.r.GetRootHash(nil)
	if err != nil {
		panic("audit: a compact range from 0 has a root: " + err.Error()) // impossible: it begins at 0
	}
	return Tree{Size: size, Root: root}
}
