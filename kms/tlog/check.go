package tlog

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/transparency-dev/merkle/compact"
	"github.com/transparency-dev/merkle/rfc6962"

	"github.com/conclave-kms/conclave/kms"
)

// Head is what the checkpoint of an exported log says. Nobody has verified it.
type Head struct {
	Note []byte // the signed note
	Size uint64 // leaves
	Root []byte // RFC 6962, 32 bytes
}

// maxNote is the longest checkpoint that is read, in bytes.
const maxNote = 4 << 20

// ReadHead reads the checkpoint of the log that was exported to a directory. Errors:
// kms.NotFound where there is none, kms.Invalid, kms.Unavailable.
func ReadHead(path string) (h Head, err error) {
	h.Note, err = readFile(filepath.Join(path, checkpointFile), maxNote)
	if err != nil {
		return Head{}, err
	}
	h.Size, h.Root, err = parseHead(h.Note)
	return h, err
}

// Open returns the first n leaves of a log that was exported to a directory as a Source.
// What it reads is not checked: see Check. Its errors: kms.NotFound for a file that is missing,
// kms.Invalid, kms.Unavailable.
func Open(path string, n uint64) Source { return dir{path, n} }

// readFile reads a file of an export, of at most limit bytes.
func readFile(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, kms.Wrap(kms.NotFound, err, path+" is missing", "")
	}
	if err != nil {
		return nil, unreadable(path, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, unreadable(path, err)
	}
	if int64(len(b)) > limit {
		return nil, kms.Errorf(kms.Invalid, "%s is longer than any such file can be", path)
	}
	return b, nil
}

func unreadable(path string, err error) error {
	return kms.Wrap(kms.Unavailable, err, path+" cannot be read", "")
}

// Check reads the log that was exported to a directory, all of it: it calls each with every
// leaf in order, holds every tile against what follows from the leaves, and the root that
// follows against the checkpoint. Slices are valid only during the call. It stops at the
// first error of each. Errors: kms.NotFound for a missing file, kms.Invalid, kms.Unavailable.
func Check(ctx context.Context, path string, h Head, each func(number uint64, leaf []byte) error) error {
	c := &checker{dir: dir{path, h.Size}, all: (&compact.RangeFactory{Hash: hashChildren}).NewEmptyRange(0)}
	for first := uint64(0); first < h.Size; first += TileWidth {
		if err := ctx.Err(); err != nil {
			return err
		}
		leaves, err := c.dir.Leaves(first, int(min(TileWidth, h.Size-first)))
		if err != nil {
			return err
		}
		for i, leaf := range leaves {
			if err := each(first+uint64(i), leaf); err != nil {
				return err
			}
			if err := c.add(leaf); err != nil {
				return err
			}
		}
	}
	return c.end(h)
}

// checker makes the tiles of a log anew.
type checker struct {
	dir   dir
	all   *compact.Range
	tiles [levels][][]byte // that are not full yet
}

func (c *checker) add(leaf []byte) error {
	hash := rfc6962.DefaultHasher.HashLeaf(leaf)
	if err := c.all.Append(hash, nil); err != nil {
		return kms.Wrap(kms.Internal, err, "the log's tree cannot be computed", "")
	}
	for level := uint(0); level < levels; level++ {
		c.tiles[level] = append(c.tiles[level], hash)
		if len(c.tiles[level]) < TileWidth {
			return nil
		}
		if err := c.compare(level); err != nil {
			return err
		}
		hash = join(c.tiles[level])
		c.tiles[level] = c.tiles[level][:0]
	}
	return nil
}

// join returns the root of a full tile.
func join(hashes [][]byte) []byte {
	for len(hashes) > 1 {
		next := make([][]byte, len(hashes)/2)
		for i := range next {
			next[i] = hashChildren(hashes[2*i], hashes[2*i+1])
		}
		hashes = next
	}
	return hashes[0]
}

// compare holds the tile of a level that ends here against the one in the directory.
func (c *checker) compare(level uint) error {
	own := c.tiles[level]
	to := c.all.End() >> (tileHeight * level)
	from := to - uint64(len(own))
	got, err := c.dir.Hashes(level, from, uint64(len(own)))
	if err != nil {
		return err
	}
	for i, hash := range own {
		if !bytes.Equal(hash, got[i]) {
			return kms.Errorf(kms.Invalid, "hash %d of tile level %d in %s is not that of its leaves", from+uint64(i), level, c.dir.path)
		}
	}
	return nil
}

func (c *checker) end(h Head) error {
	for level := range c.tiles {
		if len(c.tiles[level]) == 0 {
			continue
		}
		if err := c.compare(uint(level)); err != nil {
			return err
		}
	}
	root := rfc6962.DefaultHasher.EmptyRoot()
	if h.Size > 0 {
		var err error
		if root, err = c.all.GetRootHash(nil); err != nil {
			return kms.Wrap(kms.Internal, err, "the log's tree cannot be computed", "")
		}
	}
	if !bytes.Equal(root, h.Root) {
		return kms.Errorf(kms.Invalid, "the %d leaves in %s have another root than the checkpoint says", h.Size, c.dir.path)
	}
	return nil
}

// Bundle opens the file beside the entries in which an export has what belongs to the
// leaves from number first on, which begins a bundle. Errors: as for ReadHead.
func Bundle(path, name string, first, size uint64) (io.ReadCloser, error) {
	file := filepath.Join(path, filepath.FromSlash(numbered(name, first/TileWidth, width(size, first/TileWidth))))
	f, err := os.Open(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, kms.Wrap(kms.NotFound, err, file+" is missing", "")
	}
	if err != nil {
		return nil, unreadable(file, err)
	}
	return f, nil
}
