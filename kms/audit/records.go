package audit

import (
	"bufio"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/conclave-kms/conclave/kms"
)

// records reads the records of a log by their number, beside its writer. Where it
// ended is remembered, so that reading on costs no search.
type records struct {
	kind kind
	dir  string

	mu   sync.Mutex
	path string // segment in which record next begins at offset off; "": not known
	off  int64
	next uint64
}

// read calls fn with n payloads beginning with record from, which must have been
// written; they are valid only during the call. Errors: kms.Invalid for a damaged
// segment, kms.NotFound for one that is missing, kms.Unavailable for one that
// cannot be read, and those of fn.
func (r *records) read(from uint64, n int, fn func(payload []byte) error) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.path == "" || r.next > from {
		if err := r.find(from); err != nil {
			return err
		}
	}
	for end := from + uint64(n); r.next < end; {
		err := r.segment(from, end, fn)
		if err == nil && r.next < end {
			r.path, r.off = filepath.Join(r.dir, r.kind.name(r.next)), int64(headerSize)
		}
		if err != nil {
			r.path = ""
			return err
		}
	}
	return nil
}

// find goes to the beginning of the segment that record n is in.
func (r *records) find(n uint64) error {
	names, err := r.kind.segments(r.dir)
	if err != nil {
		return err
	}
	i, exact := slices.BinarySearch(names, r.kind.name(n))
	if !exact {
		i--
	}
	if i < 0 {
		return kms.Errorf(kms.NotFound, "the segment with record %d of the log in %s is missing", n, r.dir)
	}
	r.path = filepath.Join(r.dir, names[i])
	first, err := r.kind.first(r.path)
	r.off, r.next = int64(headerSize), first
	return err
}

// first returns the number of a segment's first record.
func (k kind) first(path string) (uint64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, unreadable(path, err)
	}
	defer f.Close()
	head := make([]byte, headerSize)
	if _, err := f.ReadAt(head, 0); err != nil {
		return 0, unreadable(path, err)
	}
	h, err := k.decode(head)
	if err != nil {
		return 0, corrupt(&damage{path: path, why: err.Error()})
	}
	return h.first, nil
}

func unreadable(path string, err error) error {
	kind := kms.Unavailable
	if errors.Is(err, fs.ErrNotExist) {
		kind = kms.NotFound
	}
	return kms.Wrap(kind, err, "the log file "+path+" cannot be read", "")
}

// segment reads on in one segment until record end or that of the segment.
func (r *records) segment(from, end uint64, fn func([]byte) error) error {
	f, err := os.Open(r.path)
	if err != nil {
		return unreadable(r.path, err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return unreadable(r.path, err)
	}
	if _, err := f.Seek(r.off, 0); err != nil {
		return unreadable(r.path, err)
	}
	br := bufio.NewReaderSize(f, 128<<10)
	var buf []byte
	for r.next < end && r.off < fi.Size() {
		payload, size, why, err := readFrame(br, &buf, fi.Size()-r.off)
		if err != nil {
			if err := at(err, r.path, r.off); errors.As(err, new(*damage)) {
				return kms.Wrap(kms.Invalid, err, "the log is damaged", "")
			}
			return unreadable(r.path, err)
		}
		if why != "" {
			return corrupt(&damage{path: r.path, offset: r.off, why: why})
		}
		if r.next >= from {
			if err := fn(payload); err != nil {
				return err
			}
		}
		r.off, r.next = r.off+size, r.next+1
	}
	return nil
}

// accessLeaves returns leaves of an access log of a size.
func accessLeaves(r *records, size, from uint64, n int) ([][]byte, error) {
	if err := within(size, from, n); err != nil {
		return nil, err
	}
	leaves := make([][]byte, 0, n)
	err := r.read(from, n, func(payload []byte) error {
		leaves = append(leaves, slices.Clone(payload))
		return nil
	})
	return leaves, err
}

func within(size, from uint64, n int) error {
	if n < 0 || uint64(n) > size || from > size-uint64(n) {
		return kms.Errorf(kms.Invalid, "the log has %d leaves, not %d from number %d on", size, n, from)
	}
	return nil
}
