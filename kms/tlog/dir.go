package tlog

import (
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/conclave-kms/conclave/kms"
)

// checkpointFile is the checkpoint's name in an exported log.
const checkpointFile = "checkpoint"

// dir reads an exported log. It believes what is there: whoever uses it compares
// the root.
type dir struct {
	path string
	size uint64
}

func (d dir) Size() uint64 { return d.size }

// read returns a file of a series, of which there are n elements. A partial one may
// have given way to the full one.
func (d dir) read(name string, index, n uint64) (b []byte, got int, err error) {
	w := width(n, index)
	if w == 0 {
		return nil, 0, kms.Errorf(kms.Invalid, "%s in %s has no number %d", name, d.path, index)
	}
	for {
		b, err = readFile(filepath.Join(d.path, filepath.FromSlash(numbered(name, index, w))), TileWidth*(2+MaxLeaf))
		if err == nil || !errors.Is(err, kms.NotFound) || w == TileWidth {
			return b, w, err
		}
		w = TileWidth
	}
}

func (d dir) Hashes(level uint, from, n uint64) ([][]byte, error) {
	if level >= levels {
		return nil, kms.Errorf(kms.Invalid, "a log has no tiles of level %d", level)
	}
	return collect(from, n, func(index uint64) ([][]byte, error) {
		b, w, err := d.read(series(level), index, d.size>>(tileHeight*level))
		if err != nil {
			return nil, err
		}
		return parseTile(b, w)
	})
}

func (d dir) Leaves(from uint64, n int) ([][]byte, error) {
	return collect(from, uint64(n), func(index uint64) ([][]byte, error) {
		b, w, err := d.read(entriesDir, index, d.size)
		if err != nil {
			return nil, err
		}
		return parseBundle(b, w)
	})
}

// collect returns n elements beginning with number from, out of tiles or bundles.
func collect(from, n uint64, get func(index uint64) ([][]byte, error)) ([][]byte, error) {
	if from+n < from {
		return nil, kms.Errorf(kms.Invalid, "%d elements from %d on are beyond any log", n, from)
	}
	var all [][]byte
	for at := from; at < from+n; {
		part, err := get(at / TileWidth)
		if err != nil {
			return nil, err
		}
		skip := at % TileWidth
		if skip >= uint64(len(part)) {
			return nil, kms.Errorf(kms.Invalid, "the log has no number %d", at)
		}
		part = part[skip:min(uint64(len(part)), skip+from+n-at)]
		all, at = append(all, part...), at+uint64(len(part))
	}
	return all, nil
}

// exported returns the size and root in the checkpoint of an exported log; size 0
// if there is none.
func exported(path string) (size uint64, root []byte, err error) {
	name := filepath.Join(path, checkpointFile)
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil, nil
	}
	if err != nil {
		return 0, nil, kms.Wrap(kms.Unavailable, err, "the exported log cannot be read", "")
	}
	size, root, err = parseHead(b)
	if err != nil {
		return 0, nil, fmt.Errorf("%s: %w", name, err)
	}
	return size, root, nil
}

// parseHead reads size and root of a checkpoint (c2sp.org/tlog-checkpoint): the
// origin, the size in decimal and the root in base64, a line each. Errors:
// kms.Invalid.
func parseHead(note []byte) (size uint64, root []byte, err error) {
	lines := strings.SplitN(string(note), "\n", 4)
	if len(lines) < 4 || lines[0] == "" {
		return 0, nil, kms.Errorf(kms.Invalid, "not a checkpoint: its three lines are missing")
	}
	size, err = strconv.ParseUint(lines[1], 10, 64)
	if err != nil || strconv.FormatUint(size, 10) != lines[1] {
		return 0, nil, kms.Errorf(kms.Invalid, "not a checkpoint: the second line is no size")
	}
	root, err = base64.StdEncoding.Strict().DecodeString(lines[2])
	if err != nil || len(root) != HashSize || base64.StdEncoding.EncodeToString(root) != lines[2] {
		return 0, nil, kms.Errorf(kms.Invalid, "not a checkpoint: the third line is no hash")
	}
	return size, root, nil
}
