package audit

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/conclave-kms/conclave/kms"
)

// Both logs are directories of segment files. A segment begins with a header
//
//	magic "CVSEGM2" 0x0a ‖ kind 1 ‖ first record 8 ‖ root 32 ‖ CRC-32C 4
//
// (first record: how many records the segments before hold; root: of the tree
// over them, zero in a cluster log; CRC over everything before it), with all
// numbers big-endian, followed by records (frame.go). The last segment of an
// access log that is open, or was not closed, may end in zeros written ahead.
const (
	segmentMagic = "CVSEGM2\n"
	headerSize   = len(segmentMagic) + 1 + 8 + 32 + 4

	// DefaultSegmentSize is where a log begins a new segment, in bytes.
	DefaultSegmentSize = 64 << 20
)

// kind says which log a segment belongs to.
type kind struct {
	letter byte
	suffix string // of the file's name
	ahead  int64  // so many zeros are written ahead of the records, in bytes
}

// Overwriting zeros is cheaper to sync than growing a file, whose length has to
// be made durable each time. The cluster log is synced too rarely to gain by it.
var (
	accessKind  = kind{'A', ".access", 1 << 20}
	clusterKind = kind{'C', ".cluster", 0}
)

type header struct {
	first uint64
	root  [32]byte
}

func (k kind) encode(h header) []byte {
	b := make([]byte, 0, headerSize)
	b = append(b, segmentMagic...)
	b = append(b, k.letter)
	b = binary.BigEndian.AppendUint64(b, h.first)
	b = append(b, h.root[:]...)
	return binary.BigEndian.AppendUint32(b, checksum(b))
}

func (k kind) decode(b []byte) (header, error) {
	var h header
	n := len(segmentMagic)
	switch {
	case len(b) != headerSize:
		return h, errors.New("the segment's header is incomplete")
	case string(b[:n]) != segmentMagic || b[n] != k.letter:
		return h, errors.New("not a segment of this log")
	case binary.BigEndian.Uint32(b[headerSize-4:]) != checksum(b[:headerSize-4]):
		return h, errors.New("the segment's header is damaged")
	}
	h.first = binary.BigEndian.Uint64(b[n+1:])
	copy(h.root[:], b[n+9:])
	return h, nil
}

// name returns the file name of the segment that begins with record first.
func (k kind) name(first uint64) string { return fmt.Sprintf("%020d%s", first, k.suffix) }

// damage reports where a log cannot be read.
type damage struct {
	path   string
	offset int64
	why    string
	torn   bool // what follows offset can only be a write that was cut short
	blank  bool // torn, and there is nothing but zeros
}

func (d *damage) Error() string { return fmt.Sprintf("%s at offset %d: %s", d.path, d.offset, d.why) }

// scan reads a segment from r, size bytes long, and calls fn with every
// payload, which is valid only during the call. It returns the header and the
// offset of the first byte after the last good record. The error is a *damage,
// one of r, or one of fn.
func (k kind) scan(path string, r io.ReaderAt, size int64, fn func(payload []byte) error) (header, int64, error) {
	br := bufio.NewReaderSize(io.NewSectionReader(r, 0, size), 256<<10)
	head := make([]byte, headerSize)
	if _, err := io.ReadFull(br, head); err != nil {
		return header{}, 0, &damage{path: path, why: "the segment's header is incomplete"}
	}
	h, err := k.decode(head)
	if err != nil {
		return h, 0, &damage{path: path, why: err.Error()}
	}
	off := int64(headerSize)
	suspect := int64(-1)
	var buf []byte
	for off < size {
		payload, n, why, err := readFrame(br, &buf, size-off)
		if err != nil {
			return h, off, at(err, path, off)
		}
		if why != "" {
			torn, blank, err := judge(r, off, n, size)
			if err != nil {
				return h, off, err
			}
			if torn || off == suspect {
				return h, off, &damage{path: path, offset: off, why: why, torn: torn, blank: blank}
			}
			suspect = off // read it again: a batch may have been written between two reads
			br.Reset(io.NewSectionReader(r, off, size-off))
			continue
		}
		if err := fn(payload); err != nil {
			return h, off, at(err, path, off)
		}
		off += n
	}
	return h, off, nil
}

// at completes a *damage that does not yet say where it is.
func at(err error, path string, off int64) error {
	var d *damage
	if errors.As(err, &d) && d.path == "" {
		d.path, d.offset = path, off
	}
	return err
}

// segments lists the segment files of dir in order. It refuses a directory or
// a segment that others may read or write, and anything that is no regular file.
func (k kind) segments(dir string) ([]string, error) {
	if err := checkDir(dir); err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, kms.Wrap(kms.Unavailable, err, "the log directory "+dir+" cannot be read", "")
	}
	var names []string
	for _, e := range entries {
		number, ok := strings.CutSuffix(e.Name(), k.suffix)
		if !ok {
			continue
		}
		if _, err := strconv.ParseUint(number, 10, 64); err != nil || len(number) != 20 {
			return nil, kms.Errorf(kms.Invalid, "%s is not the name of a segment; move it away", filepath.Join(dir, e.Name()))
		}
		if err := checkFile(filepath.Join(dir, e.Name())); err != nil {
			return nil, err
		}
		names = append(names, e.Name())
	}
	slices.Sort(names)
	return names, nil
}

func checkDir(dir string) error {
	fi, err := os.Lstat(dir)
	if err != nil {
		return kms.Wrap(kms.Unavailable, err, "the log directory "+dir+" cannot be read", "")
	}
	if !fi.IsDir() {
		return kms.Errorf(kms.Invalid, "%s is not a directory", dir)
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return kms.Errorf(kms.Invalid, "the log directory %s has mode %04o; set it to 0700", dir, fi.Mode().Perm())
	}
	return nil
}

func checkFile(path string) error {
	fi, err := os.Lstat(path)
	if err != nil {
		return kms.Wrap(kms.Unavailable, err, "the log file "+path+" cannot be read", "")
	}
	if !fi.Mode().IsRegular() {
		return kms.Errorf(kms.Invalid, "%s is not a regular file", path)
	}
	if fi.Mode().Perm()&0o077 != 0 {
		return kms.Errorf(kms.Invalid, "the log file %s has mode %04o; set it to 0600", path, fi.Mode().Perm())
	}
	return nil
}

// tail is what a walk over a log found at its end.
type tail struct {
	name    string // last segment, "" in an empty log
	good    int64  // its length up to the last good record
	records uint64
	torn    *damage // nil unless the last segment ends in a torn record
}

// walk scans all segments of dir in order. begin is called with the header of
// every segment, record with every payload. A torn record at the very end is
// reported in tail; every other damage is an error that names file and offset.
func (k kind) walk(dir string, begin func(h header) error, record func(payload []byte) error) (tail, error) {
	names, err := k.segments(dir)
	if err != nil {
		return tail{}, err
	}
	var t tail
	for i, name := range names {
		path := filepath.Join(dir, name)
		if name != k.name(t.records) {
			return t, corrupt(&damage{path: path, why: fmt.Sprintf("a segment is missing: record %d should follow", t.records)})
		}
		t.name = name
		err := k.walkSegment(path, &t, begin, record)
		var d *damage
		if errors.As(err, &d) {
			if d.torn && i == len(names)-1 {
				if !d.blank || k.ahead == 0 {
					t.torn = d
				}
				return t, nil
			}
			return t, corrupt(d)
		}
		if err != nil {
			return t, err
		}
	}
	return t, nil
}

func (k kind) walkSegment(path string, t *tail, begin func(header) error, record func([]byte) error) error {
	f, err := os.Open(path)
	if err != nil {
		return kms.Wrap(kms.Unavailable, err, "the log file "+path+" cannot be read", "")
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return kms.Wrap(kms.Unavailable, err, "the log file "+path+" cannot be read", "")
	}
	head := make([]byte, headerSize)
	if _, err := f.ReadAt(head, 0); err != nil {
		return &damage{path: path, why: "the segment's header is incomplete"}
	}
	h, err := k.decode(head)
	if err != nil {
		return &damage{path: path, why: err.Error()}
	}
	if h.first != t.records {
		return &damage{path: path, why: fmt.Sprintf("the header says record %d, the file name %d", h.first, t.records)}
	}
	if err := begin(h); err != nil {
		return &damage{path: path, why: err.Error()}
	}
	_, good, err := k.scan(path, f, fi.Size(), func(payload []byte) error {
		if err := record(payload); err != nil {
			return err
		}
		t.records++
		return nil
	})
	t.good = good
	return err
}

// corrupt is the error for a log that must not be written on or trusted.
func corrupt(d *damage) error {
	return kms.Wrap(kms.Invalid, d, "the log is damaged: "+d.Error(),
		"restore the file from a copy, or keep the whole directory as evidence and begin a new one")
}
