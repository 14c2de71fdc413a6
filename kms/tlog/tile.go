package tlog

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"

	"github.com/conclave-kms/conclave/kms"
)

// numbered returns the path of number index of a series of tiles or bundles below
// dir: three digits an element, all but the last with an x, and the width of one
// that is not full.
func numbered(dir string, index uint64, width int) string {
	p := fmt.Sprintf("%03d", index%1000)
	for index /= 1000; index > 0; index /= 1000 {
		p = fmt.Sprintf("x%03d/", index%1000) + p
	}
	if width < TileWidth {
		p += ".p/" + strconv.Itoa(width)
	}
	return dir + "/" + p
}

// series is where tiles of a level lie.
func series(level uint) string { return "tile/" + strconv.FormatUint(uint64(level), 10) }

// entriesDir is where entry bundles lie.
const entriesDir = "tile/entries"

// covering returns how many full tiles a series of n hashes or entries has and the
// width of the one after them, which is 0 if there is none.
func covering(n uint64) (full uint64, width int) { return n / TileWidth, int(n % TileWidth) }

// width returns the width of tile index in a series of n.
func width(n, index uint64) int {
	full, rest := covering(n)
	switch {
	case index < full:
		return TileWidth
	case index == full:
		return rest
	}
	return 0
}

// parseTile decodes a tile of so many hashes. Errors: kms.Invalid.
func parseTile(b []byte, width int) ([][]byte, error) {
	if len(b) != width*HashSize {
		return nil, kms.Errorf(kms.Invalid, "a tile of %d hashes has %d bytes", width, len(b))
	}
	return slices.Collect(slices.Chunk(b, HashSize)), nil
}

// appendEntry appends an entry of a bundle to b: its length in two bytes,
// big-endian, and the leaf. Errors: kms.TooLarge.
func appendEntry(b, leaf []byte) ([]byte, error) {
	if len(leaf) > MaxLeaf {
		return nil, kms.Errorf(kms.TooLarge, "a leaf has %d bytes; the limit is %d", len(leaf), MaxLeaf)
	}
	return append(binary.BigEndian.AppendUint16(b, uint16(len(leaf))), leaf...), nil
}

// parseBundle decodes an entry bundle of so many leaves, which stay parts of b.
// Errors: kms.Invalid.
func parseBundle(b []byte, width int) ([][]byte, error) {
	leaves := make([][]byte, 0, min(width, TileWidth))
	for range width {
		if len(b) < 2 {
			return nil, kms.Errorf(kms.Invalid, "an entry bundle ends after %d of %d entries", len(leaves), width)
		}
		n := 2 + int(binary.BigEndian.Uint16(b))
		if len(b) < n {
			return nil, kms.Errorf(kms.Invalid, "an entry bundle ends within entry %d", len(leaves))
		}
		leaves, b = append(leaves, b[2:n:n]), b[n:]
	}
	if len(b) > 0 {
		return nil, kms.Errorf(kms.Invalid, "an entry bundle has %d bytes after its %d entries", len(b), width)
	}
	return leaves, nil
}
