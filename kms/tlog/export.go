package tlog

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/conclave-kms/conclave/kms"
)

// Beside is a series of bundles that an export has besides those of the leaves: for
// every leaf something that does not fit there. The files lie below Name as entry
// bundles do below tile/entries.
type Beside struct {
	Name  string
	Write func(w io.Writer, from uint64, n int) error // of n leaves, beginning with number from
}

// Export brings the directory to what checkpoint, a signed note, says of the log:
// tiles, entry bundles, what lies beside, and the checkpoint last. What is there is
// not written again, so an export that was cut short continues, and files
// are never seen half-written. Partial tiles that have become full are removed.
// Errors: kms.Conflict where the directory holds another log or a longer one,
// kms.Invalid for a checkpoint that is not of this log, kms.Unavailable for a
// directory that cannot be written.
func Export(ctx context.Context, s Source, path string, checkpoint []byte, beside ...Beside) error {
	n, root, err := parseHead(checkpoint)
	if err != nil {
		return err
	}
	if own, err := Root(s, n); err != nil {
		return err
	} else if !bytes.Equal(own, root) {
		return kms.Errorf(kms.Invalid, "the checkpoint has another root for %d leaves than the log", n)
	}
	old, err := continues(s, path, n)
	if err != nil {
		return err
	}
	x := exporter{source: s, path: filepath.Clean(path), old: old, size: n, touched: map[string]bool{}}
	if err := x.run(ctx, checkpoint, beside); err != nil {
		if _, ok := errors.AsType[*fs.PathError](err); ok {
			return kms.Wrap(kms.Unavailable, err, "the log cannot be exported", "check the directory's owner and free space")
		}
		return err
	}
	return nil
}

// continues returns the size of the log that the directory holds, and refuses
// another one.
func continues(s Source, path string, n uint64) (uint64, error) {
	old, root, err := exported(path)
	if err != nil {
		return 0, err
	}
	if old > n {
		return 0, kms.Errorf(kms.Conflict, "%s holds %d leaves already, more than the %d to be exported", path, old, n)
	}
	own, err := Root(s, old)
	if err != nil {
		return 0, err
	}
	if old > 0 && !bytes.Equal(own, root) {
		return 0, kms.Errorf(kms.Conflict, "%s holds another log: its first %d leaves have another root", path, old)
	}
	return old, nil
}

type exporter struct {
	source    Source
	path      string
	old, size uint64          // leaves of the checkpoint that is there and of the one to come
	touched   map[string]bool // directories to be synced
}

func (x *exporter) run(ctx context.Context, checkpoint []byte, beside []Beside) error {
	for _, b := range slices.Concat(beside, []Beside{{entriesDir, x.entries}}) {
		if err := x.series(ctx, b.Name, x.old, x.size, b.Write); err != nil {
			return err
		}
	}
	for level := uint(0); level < levels && x.size>>(tileHeight*level) > 0; level++ {
		err := x.series(ctx, series(level), x.old>>(tileHeight*level), x.size>>(tileHeight*level), func(w io.Writer, from uint64, n int) error {
			return x.tile(w, level, from, n)
		})
		if err != nil {
			return err
		}
	}
	for d := range x.touched {
		if err := syncDir(d); err != nil {
			return err
		}
	}
	if err := x.file(checkpointFile, true, func(w io.Writer) error { _, err := w.Write(checkpoint); return err }); err != nil {
		return err
	}
	if err := syncDir(x.path); err != nil {
		return err
	}
	return x.tidy(beside)
}

func (x *exporter) entries(w io.Writer, from uint64, n int) error {
	leaves, err := x.source.Leaves(from, n)
	if err != nil {
		return err
	}
	if len(leaves) != n {
		return kms.Errorf(kms.Internal, "the log returned %d leaves in place of %d", len(leaves), n)
	}
	var b []byte
	for _, leaf := range leaves {
		if b, err = appendEntry(b, leaf); err != nil {
			return err
		}
	}
	_, err = w.Write(b)
	return err
}

func (x *exporter) tile(w io.Writer, level uint, from uint64, n int) error {
	h, err := hashes(x.source, level, from, uint64(n))
	if err != nil {
		return err
	}
	_, err = w.Write(bytes.Join(h, nil))
	return err
}

// series writes the files of a series that had old elements and is to have n.
func (x *exporter) series(ctx context.Context, name string, old, n uint64, write func(io.Writer, uint64, int) error) error {
	for index := old / TileWidth; ; index++ {
		w := width(n, index)
		if w == 0 || n == old {
			return nil
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		err := x.file(numbered(name, index, w), false, func(f io.Writer) error { return write(f, index*TileWidth, w) })
		if err != nil {
			return err
		}
	}
}

// file writes a file under another name first. One that is there has to be equal,
// unless it may be replaced.
func (x *exporter) file(name string, replace bool, write func(io.Writer) error) error {
	path := filepath.Join(x.path, filepath.FromSlash(name))
	if err := x.makeDir(filepath.Dir(path)); err != nil {
		return err
	}
	f, err := os.OpenFile(path+".new", os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o640)
	if err != nil {
		return err
	}
	defer f.Close()
	buf := bufio.NewWriterSize(f, 64<<10)
	if err := errors.Join(write(buf), buf.Flush()); err != nil {
		return errors.Join(err, os.Remove(path+".new"))
	}
	if !replace {
		switch same, err := holds(path, f); {
		case err != nil:
			return err
		case same:
			return os.Remove(path + ".new")
		}
	}
	if err := f.Sync(); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// holds reports whether the file at path is there, and refuses one that is not
// equal to f.
func holds(path string, f io.ReadSeeker) (bool, error) {
	old, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer old.Close()
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return false, err
	}
	a, b := bufio.NewReader(old), bufio.NewReader(f)
	for {
		x, errA := a.ReadByte()
		y, errB := b.ReadByte()
		switch {
		case errA == io.EOF && errB == io.EOF:
			return true, nil
		case errA != nil && errA != io.EOF || errB != nil && errB != io.EOF:
			return false, errors.Join(errA, errB)
		case errA != errB || x != y:
			return false, kms.Errorf(kms.Conflict, "%s is there with another content: the directory holds another log", path)
		}
	}
}

// makeDir makes a directory below the export's, and remembers what is to be synced.
func (x *exporter) makeDir(path string) error {
	if x.touched[path] {
		return nil
	}
	if err := os.MkdirAll(path, 0o750); err != nil {
		return err
	}
	for ; !x.touched[path]; path = filepath.Dir(path) {
		x.touched[path] = true
		if path == x.path {
			break
		}
	}
	return nil
}

// tidy removes partial tiles whose full ones are there.
func (x *exporter) tidy(beside []Beside) error {
	names := []string{entriesDir}
	for _, b := range beside {
		names = append(names, b.Name)
	}
	for _, name := range names {
		if err := x.tidySeries(name, x.old, x.size); err != nil {
			return err
		}
	}
	for level := uint(0); level < levels; level++ {
		if err := x.tidySeries(series(level), x.old>>(tileHeight*level), x.size>>(tileHeight*level)); err != nil {
			return err
		}
	}
	return nil
}

// tidySeries looks at the one partial tile that the checkpoint before had.
func (x *exporter) tidySeries(name string, old, n uint64) error {
	if width(old, old/TileWidth) == 0 || width(n, old/TileWidth) < TileWidth {
		return nil
	}
	partial := filepath.Dir(numbered(name, old/TileWidth, 1))
	return os.RemoveAll(filepath.Join(x.path, filepath.FromSlash(partial)))
}

func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
