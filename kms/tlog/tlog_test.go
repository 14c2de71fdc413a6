package tlog

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"testing"

	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/merkle/testonly"
	reference "golang.org/x/mod/sumdb/tlog"
	"pgregory.net/rapid"

	"github.com/conclave-kms/conclave/kms"
)

// list is a log in memory, whose hashes are computed from the leaves each time.
type list [][]byte

func (l list) Size() uint64 { return uint64(len(l)) }

func (l list) Leaves(from uint64, n int) ([][]byte, error) {
	return slices.Clone(l[from : from+uint64(n)]), nil
}

func (l list) Hashes(level uint, from, n uint64) ([][]byte, error) {
	span := uint64(1) << (tileHeight * level)
	if (from+n)*span > l.Size() {
		return nil, kms.Errorf(kms.Invalid, "hashes %d to %d of level %d are not there", from, from+n, level)
	}
	var h [][]byte
	for i := from; i < from+n; i++ {
		h = append(h, rootOf(l[i*span:(i+1)*span]))
	}
	return h, nil
}

// rootOf is MTH of RFC 6962 section 2.1 to the letter.
func rootOf(leaves [][]byte) []byte {
	switch len(leaves) {
	case 0:
		return rfc6962.DefaultHasher.EmptyRoot()
	case 1:
		return rfc6962.DefaultHasher.HashLeaf(leaves[0])
	}
	k := 1
	for 2*k < len(leaves) {
		k *= 2
	}
	return rfc6962.DefaultHasher.HashChildren(rootOf(leaves[:k]), rootOf(leaves[k:]))
}

func leaves(n int) list {
	l := make(list, n)
	for i := range l {
		l[i] = fmt.Appendf(nil, "leaf %d", i)
	}
	return l
}

func must[T any](t interface {
	Helper()
	Fatal(...any)
}) func(T, error) T {
	return func(v T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// TestKnownRoots compares roots and proofs with the answers of the Certificate
// Transparency reference implementation (transparency-dev/merkle/testonly).
func TestKnownRoots(t *testing.T) {
	l, roots := list(testonly.LeafInputs()), testonly.RootHashes()
	if len(l) != 8 || len(roots) != 9 {
		t.Fatal("the known answers are not those of the reference implementation")
	}
	for n := range roots {
		if got := must[[]byte](t)(Root(l, uint64(n))); !bytes.Equal(got, roots[n]) {
			t.Errorf("the root of %d leaves is %x, want %x", n, got, roots[n])
		}
	}
	h := testonly.NodeHashes()
	// The proofs for leaf 5 of 7 and from 6 to 8 leaves, drawn as in RFC 6962 section 2.1.3.
	if got, want := must[[][]byte](t)(Inclusion(l, 5, 7)), [][]byte{h[0][4], h[0][6], h[2][0]}; !slices.EqualFunc(got, want, bytes.Equal) {
		t.Errorf("inclusion proof %x, want %x", got, want)
	}
	if got, want := must[[][]byte](t)(Consistency(l, 6, 8)), [][]byte{h[1][2], h[1][3], h[2][0]}; !slices.EqualFunc(got, want, bytes.Equal) {
		t.Errorf("consistency proof %x, want %x", got, want)
	}
}

// stored is the log as the reference implementation keeps it.
type stored []reference.Hash

func (s stored) ReadHashes(at []int64) ([]reference.Hash, error) {
	h := make([]reference.Hash, len(at))
	for i, a := range at {
		h[i] = s[a]
	}
	return h, nil
}

func store(t *testing.T, l list) stored {
	var s stored
	for i, leaf := range l {
		s = append(s, must[[]reference.Hash](t)(reference.StoredHashes(int64(i), leaf, s))...)
	}
	return s
}

func flat(p []reference.Hash) [][]byte {
	var b [][]byte
	for _, h := range p {
		b = append(b, h[:])
	}
	return b
}

// TestAgainstSumdb compares proofs and tiles with those of golang.org/x/mod/sumdb/tlog.
func TestAgainstSumdb(t *testing.T) {
	const size = 700
	l := leaves(size)
	s := store(t, l)
	rapid.Check(t, func(r *rapid.T) {
		n := rapid.Uint64Range(1, size).Draw(r, "size")
		i := rapid.Uint64Range(0, n-1).Draw(r, "leaf")
		m := rapid.Uint64Range(1, n).Draw(r, "earlier size")
		root, before := must[[]byte](r)(Root(l, n)), must[[]byte](r)(Root(l, m))
		if want := must[reference.Hash](r)(reference.TreeHash(int64(n), s)); !bytes.Equal(root, want[:]) {
			r.Fatalf("root %x, want %x", root, want)
		}
		p := must[[][]byte](r)(Inclusion(l, i, n))
		if want := must[reference.RecordProof](r)(reference.ProveRecord(int64(n), int64(i), s)); !slices.EqualFunc(p, flat(want), bytes.Equal) {
			r.Fatalf("inclusion proof %x, want %x", p, want)
		}
		q := must[[][]byte](r)(Consistency(l, m, n))
		if want := must[reference.TreeProof](r)(reference.ProveTree(int64(n), int64(m), s)); !slices.EqualFunc(q, flat(want), bytes.Equal) {
			r.Fatalf("consistency proof %x, want %x", q, want)
		}
		leafHash := rfc6962.DefaultHasher.HashLeaf(l[i])
		if err := errors.Join(VerifyInclusion(i, n, leafHash, p, root), VerifyConsistency(m, n, q, before, root)); err != nil {
			r.Fatal(err)
		}
		refuseAltered(r, p, func(p [][]byte) error { return VerifyInclusion(i, n, leafHash, p, root) })
		refuseAltered(r, q, func(q [][]byte) error { return VerifyConsistency(m, n, q, before, root) })
		if err := VerifyInclusion((i+1)%n, n, leafHash, p, root); n > 1 && !errors.Is(err, kms.Invalid) {
			r.Fatalf("a proof for another leaf: %v", err)
		}
	})
}

func refuseAltered(r *rapid.T, p [][]byte, verify func([][]byte) error) {
	longer := append(slices.Clone(p), make([]byte, HashSize))
	alterations := [][][]byte{longer}
	if len(p) > 0 {
		bit := slices.Clone(p)
		bit[0] = slices.Clone(bit[0])
		bit[0][7] ^= 1
		moved := slices.Clone(p) // the same bytes, cut elsewhere
		moved[0] = append(slices.Clone(moved[0]), 0)
		alterations = append(alterations, p[1:], bit, moved)
	}
	for i, a := range alterations {
		if err := verify(a); !errors.Is(err, kms.Invalid) {
			r.Fatalf("alteration %d was accepted: %v", i, err)
		}
	}
}

func TestProofsOutOfRange(t *testing.T) {
	l := leaves(10)
	empty := rfc6962.DefaultHasher.EmptyRoot()
	root := must[[]byte](t)(Root(l, 10))
	_, a := Root(l, 11)
	_, b := Inclusion(l, 10, 10)
	_, c := Inclusion(l, 3, 11)
	_, d := Consistency(l, 10, 9)
	_, e := Consistency(l, 1, 11)
	for i, err := range []error{a, b, c, d, e,
		VerifyConsistency(0, 10, nil, root, root), // not the root of no leaves
		VerifyConsistency(11, 10, nil, root, root),
		VerifyInclusion(10, 10, root, nil, root),
	} {
		if !errors.Is(err, kms.Invalid) {
			t.Errorf("case %d: %v", i, err)
		}
	}
	if err := VerifyConsistency(0, 10, nil, empty, root); err != nil {
		t.Error(err)
	}
}

// TestPaths has the examples of c2sp.org/tlog-tiles.
func TestPaths(t *testing.T) {
	for want, got := range map[string]string{
		"tile/0/x001/x234/067":                numbered(series(0), 1234067, 256),
		"tile/1/x001/x234/067.p/8":            numbered(series(1), 1234067, 8),
		"tile/entries/000":                    numbered(entriesDir, 0, 256),
		"tile/entries/999.p/255":              numbered(entriesDir, 999, 255),
		"tile/63/x001/000":                    numbered(series(63), 1000, 256),
		"tile/3/x123/x456/078":                numbered(series(3), 123456078, 256),
		"tile/0/x072/x057/x594/x037/x927/935": numbered(series(0), 1<<56-1, 256),
	} {
		if got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
	type part struct {
		full uint64
		rest int
	}
	for level, want := range []part{{273, 112}, {1, 17}, {0, 1}, {0, 0}} { // a tree of 70,000
		full, rest := covering(70000 >> (8 * level))
		if (part{full, rest}) != want {
			t.Errorf("level %d has %d full tiles and one of %d, want %v", level, full, rest, want)
		}
	}
}

// TestTilesAgainstSumdb compares what is in the tiles, see TestAgainstSumdb.
func TestTilesAgainstSumdb(t *testing.T) {
	const size = 70_000 % 4096 // more than two levels need more leaves than a test has time for
	l := leaves(size)
	s := store(t, l)
	x := exporter{source: l, size: size}
	for _, tile := range reference.NewTiles(tileHeight, 0, size) {
		want := must[[]byte](t)(reference.ReadTileData(tile, s))
		var got bytes.Buffer
		if err := x.tile(&got, uint(tile.L), uint64(tile.N)*TileWidth, tile.W); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Bytes(), want) {
			t.Errorf("%s differs", tile.Path())
		}
		path := "tile/8/" + numbered(series(uint(tile.L)), uint64(tile.N), tile.W)[len("tile/"):]
		if path != tile.Path() {
			t.Errorf("path %s, want %s", path, tile.Path())
		}
	}
}

func TestBundle(t *testing.T) {
	var b []byte
	want := [][]byte{[]byte("ab"), {}, bytes.Repeat([]byte{7}, MaxLeaf)}
	for _, leaf := range want {
		b = must[[]byte](t)(appendEntry(b, leaf))
	}
	if !bytes.HasPrefix(b, []byte("\x00\x02ab\x00\x00\xff\xff\x07")) {
		t.Errorf("the bundle begins with %x", b[:9])
	}
	if got := must[[][]byte](t)(parseBundle(b, 3)); !slices.EqualFunc(got, want, bytes.Equal) {
		t.Error("the bundle holds other leaves")
	}
	for _, w := range []int{2, 4} {
		if _, err := parseBundle(b, w); !errors.Is(err, kms.Invalid) {
			t.Errorf("a bundle of 3 was taken for one of %d: %v", w, err)
		}
	}
	if _, err := appendEntry(nil, make([]byte, MaxLeaf+1)); !errors.Is(err, kms.TooLarge) {
		t.Errorf("too long a leaf: %v", err)
	}
}

func FuzzBundle(f *testing.F) {
	f.Add([]byte("\x00\x02ab\x00\x00"), 2)
	f.Fuzz(func(t *testing.T, b []byte, width int) {
		leaves, err := parseBundle(b, width%(TileWidth+1))
		if err != nil {
			return
		}
		var again []byte
		for _, leaf := range leaves {
			again = must[[]byte](t)(appendEntry(again, leaf))
		}
		if !bytes.Equal(again, b) {
			t.Errorf("%x was read as %x", b, again)
		}
	})
}

func FuzzTile(f *testing.F) {
	f.Add(make([]byte, 3*HashSize), 3)
	f.Fuzz(func(t *testing.T, b []byte, width int) {
		h, err := parseTile(b, width%(TileWidth+1))
		if err == nil && (!bytes.Equal(bytes.Join(h, nil), b) || checkLengths(h) != nil) {
			t.Errorf("%x was read as %x", b, h)
		}
	})
}

func FuzzHead(f *testing.F) {
	f.Add(note(leaves(3), 3))
	f.Fuzz(func(t *testing.T, b []byte) {
		size, root, err := parseHead(b)
		if err != nil {
			if !errors.Is(err, kms.Invalid) {
				t.Error(err)
			}
			return
		}
		origin, _, _ := bytes.Cut(b, []byte("\n"))
		if !bytes.HasPrefix(b, head(string(origin), size, root)) {
			t.Errorf("%q was read as %d, %x", b, size, root)
		}
	})
}

func FuzzVerify(f *testing.F) {
	f.Add(uint64(3), uint64(7), []byte("root"), make([]byte, 3*HashSize))
	f.Fuzz(func(t *testing.T, m, n uint64, root, p []byte) {
		sum := sha256.Sum256(root)
		proof := slices.Collect(slices.Chunk(p, HashSize))
		if VerifyInclusion(m, n, sum[:], proof, sum[:]) == nil && n != 1 {
			t.Error("a root was proved to be in itself")
		}
		if VerifyConsistency(m, n, proof, sum[:], sum[:]) == nil && m != n {
			t.Error("two sizes were proved to have one root")
		}
	})
}
