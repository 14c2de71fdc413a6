package audit

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
)

// A record is
//
//	length with the highest bit set 4 ‖ CRC-32C of these 4 ‖
//	payload ‖
//	bytes of its batch up to the record's end 4 ‖ CRC-32C of payload 4 ‖ CRC-32C of these 8
//
// A batch is what was written at once, and only the last batch may not have been
// synced. The length has its own CRC so that a damaged length is never taken for
// a record that was cut short; a written record never begins with a zero byte;
// and its end tells which batch it belongs to even where a disk that was
// overwriting zeros lost what came before it.
const (
	frameHead = 8
	frameTail = 12
	frameSize = frameHead + frameTail

	written = 1 << 31 // the highest bit of the length
	sector  = 512     // the least that a disk writes at once, in bytes

	// maxRecord bounds the payload of a record, in bytes.
	maxRecord = 16 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func checksum(b []byte) uint32 { return crc32.Checksum(b, castagnoli) }

// appendFrame appends the record of a payload to b, where its batch begins at
// b[batch].
func appendFrame(b, payload []byte, batch int) []byte {
	at := len(b)
	b = binary.BigEndian.AppendUint32(b, written|uint32(len(payload)))
	b = binary.BigEndian.AppendUint32(b, checksum(b[at:]))
	b = append(b, payload...)
	at = len(b)
	b = binary.BigEndian.AppendUint32(b, uint32(at+frameTail-batch))
	b = binary.BigEndian.AppendUint32(b, checksum(payload))
	return binary.BigEndian.AppendUint32(b, checksum(b[at:]))
}

// headLength returns the length of the record that begins with b.
func headLength(b []byte) (length int64, ok bool) {
	if len(b) < frameHead || binary.BigEndian.Uint32(b[4:]) != checksum(b[:4]) {
		return 0, false
	}
	return int64(binary.BigEndian.Uint32(b)) - written, true
}

// tailBatch returns how many bytes of its batch there are up to the end of b,
// where b is the end of a record.
func tailBatch(b []byte) (n int64, ok bool) {
	if binary.BigEndian.Uint32(b[8:]) != checksum(b[:8]) {
		return 0, false
	}
	return int64(binary.BigEndian.Uint32(b)), true
}

// readFrame reads one record of at most left bytes into buf. It returns the
// record's payload and length and, where it is not whole, why.
func readFrame(r io.Reader, buf *[]byte, left int64) (payload []byte, n int64, why string, err error) {
	const incomplete = "the last record is incomplete"
	if left < frameSize {
		return nil, left + 1, incomplete, nil
	}
	// A file that ends before its length was cut by its writer closing it.
	read := func(size int64) (ended bool, err error) {
		*buf = slices.Grow((*buf)[:0], int(size))[:size]
		_, err = io.ReadFull(r, *buf)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			return true, nil
		}
		return false, err
	}
	if ended, err := read(frameHead); ended || err != nil {
		return nil, left + 1, incomplete, err
	}
	length, ok := headLength(*buf)
	if !ok {
		return nil, frameHead, "the length of a record is damaged", nil
	}
	if length <= 0 || length > maxRecord {
		return nil, 0, "", &damage{why: fmt.Sprintf("a record has the impossible length %d", length)}
	}
	n = frameSize + length
	if n > left {
		return nil, n, incomplete, nil
	}
	if ended, err := read(length + frameTail); ended || err != nil {
		return nil, left + 1, incomplete, err
	}
	payload, tail := (*buf)[:length], (*buf)[length:]
	if batch, ok := tailBatch(tail); !ok || batch < n || binary.BigEndian.Uint32(tail[4:]) != checksum(payload) {
		return nil, n, "a record is damaged", nil
	}
	return payload, n, "", nil
}

// judge says what the bad record of n bytes at off is. It is torn, a write that
// was cut short, if it would reach beyond the file's end, or the file is zero
// from somewhere inside it to the end, or whole sectors in it are still zero and
// all that follows is of the same batch. It is blank if only zeros follow off.
func judge(r io.ReaderAt, off, n, size int64) (torn, blank bool, err error) {
	rest := make([]byte, size-off)
	got, err := r.ReadAt(rest, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return false, false, err
	}
	rest = bytes.TrimRight(rest[:got], "\x00")
	switch {
	case len(rest) == 0:
		return true, true, nil
	case off+n > size || int64(len(rest)) < n:
		return true, false, nil
	}
	return unwritten(rest, off, n) && oneBatch(rest), false, nil
}

// unwritten reports whether a sector that the n bytes at off touch is zero from
// off on. b is what the file holds there.
func unwritten(b []byte, off, n int64) bool {
	for from := int64(0); from < n; {
		to := from + sector - (off+from)%sector
		if len(bytes.Trim(b[from:min(to, int64(len(b)))], "\x00")) == 0 {
			return true
		}
		from = to
	}
	return false
}

// oneBatch reports whether b, which follows the last good record, belongs to one
// batch: no record in it ends a batch that began later, for then the lost one
// had been synced; and no byte of it lies outside the records found.
func oneBatch(b []byte) bool {
	covered := 0
	if length, ok := headLength(b); ok {
		covered = frameSize + int(length)
	}
	for end := frameTail; end <= len(b); end++ {
		batch, ok := tailBatch(b[end-frameTail : end])
		if !ok {
			continue
		}
		if batch < int64(end) {
			return false
		}
		covered = end
		if length, ok := headLength(b[end:]); ok {
			covered = end + frameSize + int(length)
		}
	}
	return covered >= len(b)
}
