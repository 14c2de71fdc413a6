package audit

import (
	"errors"
	"os"
	"path/filepath"
	"strings"

	"github.com/conclave-kms/conclave/kms"
)

// file is what a segment writer needs of an open file; tests inject failures.
type file interface {
	WriteAt(b []byte, off int64) (int, error)
	Truncate(size int64) error
	Sync() error // contents and length are durable afterwards
	Close() error
}

// disk creates and opens segments; tests inject failures.
type disk interface {
	// create makes a new segment with its header, durable under its name.
	create(dir, name string, header []byte) (file, error)
	// resume cuts an existing segment to size bytes and opens it for writing.
	resume(dir, name string, size int64) (file, error)
}

// osDisk is the file system.
type osDisk struct{}

type osFile struct{ *os.File }

func (f osFile) Sync() error { return fdatasync(f.File) }

const newSuffix = ".new"

// create writes the header under another name first, so that a segment that is
// there has a whole header.
func (osDisk) create(dir, name string, header []byte) (file, error) {
	path := filepath.Join(dir, name)
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		if err == nil {
			err = os.ErrExist
		}
		return nil, &os.PathError{Op: "create", Path: path, Err: err}
	}
	f, err := os.OpenFile(path+newSuffix, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	if _, err = f.Write(header); err == nil {
		err = f.Sync()
	}
	if err == nil {
		err = os.Rename(path+newSuffix, path)
	}
	if err == nil {
		err = syncDir(dir)
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return osFile{f}, nil
}

func (osDisk) resume(dir, name string, size int64) (file, error) {
	f, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && fi.Size() != size {
		err = f.Truncate(size)
	}
	if err == nil {
		err = f.Sync() // what was read at recovery must be as durable as it is taken to be
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return osFile{f}, nil
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}

// lockDir makes the directory if it is missing, checks it and takes an exclusive
// lock on it, which is released by closing the file returned. It removes
// segments whose creation was cut short.
func lockDir(dir string) (*os.File, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, kms.Wrap(kms.Unavailable, err, "the log directory "+dir+" cannot be made", "check the path and its owner")
	}
	if err := checkDir(dir); err != nil {
		return nil, err
	}
	d, err := os.Open(dir)
	if err != nil {
		return nil, kms.Wrap(kms.Unavailable, err, "the log directory "+dir+" cannot be read", "")
	}
	if err := flock(d); err != nil {
		d.Close()
		return nil, kms.Wrap(kms.Unavailable, err, "the log directory "+dir+" is in use by another process", "stop it first")
	}
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if err == nil && strings.HasSuffix(e.Name(), newSuffix) {
			err = os.Remove(filepath.Join(dir, e.Name()))
		}
	}
	if err != nil {
		d.Close()
		return nil, kms.Wrap(kms.Unavailable, err, "the log directory "+dir+" cannot be cleaned", "")
	}
	return d, nil
}

// segmentWriter appends records to the last segment and begins new ones.
type segmentWriter struct {
	disk  disk
	dir   string
	kind  kind
	limit int64 // begin a new segment beyond this size
	file  file  // nil: none yet
	size  int64 // where the next record goes
	room  int64 // the file is zero from size to here; no more than size: nothing is written ahead
}

// zeros are what is written ahead.
var zeros [64 << 10]byte

// open resumes the last segment that a walk found.
func (w *segmentWriter) open(t tail) error {
	if t.name == "" {
		return nil
	}
	f, err := w.disk.resume(w.dir, t.name, t.good)
	if err != nil {
		return err
	}
	w.file, w.size, w.room = f, t.good, t.good
	return nil
}

// startsSegment reports whether n more bytes begin a new segment.
func (w *segmentWriter) startsSegment(n int) bool {
	return w.file == nil || w.size > int64(headerSize) && w.size+int64(n) > w.limit
}

// write writes a batch of framed records; h is the header in case they begin a
// segment. The segment left behind is cut to its records and synced.
func (w *segmentWriter) write(frames []byte, h header) error {
	if w.file != nil && w.startsSegment(len(frames)) {
		if err := w.cut(); err != nil {
			return err
		}
		if err := w.file.Sync(); err != nil {
			return err
		}
		if err := w.file.Close(); err != nil {
			return err
		}
		w.file = nil
	}
	if w.file == nil {
		f, err := w.disk.create(w.dir, w.kind.name(h.first), w.kind.encode(h))
		if err != nil {
			return err
		}
		w.file, w.size, w.room = f, int64(headerSize), int64(headerSize)
	}
	n, err := w.file.WriteAt(frames, w.size)
	w.size += int64(n)
	if err == nil && w.size > w.room {
		w.extend()
	}
	return err
}

// extend writes zeros ahead of the records, made durable by the sync that
// follows. Where there is no space for them the file grows with its records, so
// a failure here is none of the log.
func (w *segmentWriter) extend() {
	w.room = w.size
	for end := min(w.size+w.kind.ahead, w.limit); w.room < end; {
		n, err := w.file.WriteAt(zeros[:min(int64(len(zeros)), end-w.room)], w.room)
		w.room += int64(n)
		if err != nil {
			return
		}
	}
}

// cut removes the zeros written ahead.
func (w *segmentWriter) cut() error {
	if w.room <= w.size {
		return nil
	}
	w.room = w.size
	return w.file.Truncate(w.size)
}

func (w *segmentWriter) sync() error {
	if w.file == nil {
		return nil
	}
	return w.file.Sync()
}

func (w *segmentWriter) close() error {
	if w.file == nil {
		return nil
	}
	err := errors.Join(w.cut(), w.file.Close())
	w.file = nil
	return err
}
