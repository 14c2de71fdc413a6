package child

import (
	"io"

	"github.com/conclave-kms/conclave/kms/secret"
)

// reader cuts a stream into frames, in locked memory.
type reader struct {
	src      io.Reader
	buf      *secret.Bytes
	from, to int // what has been read and not yet been taken
}

func newReader(src io.Reader) (*reader, error) {
	buf, err := secret.New(maxFrame)
	if err != nil {
		return nil, unavailablef("%v", err)
	}
	return &reader{src: src, buf: buf}, nil
}

// next returns the next whole frame, which is wiped at the call after it. At the end
// of the stream it is io.EOF, within a frame io.ErrUnexpectedEOF.
func (r *reader) next() ([]byte, error) {
	b := r.buf.Reveal()
	for {
		n, err := frameLength(b[r.from:r.to])
		if err != nil {
			return nil, err
		}
		if n > 0 && r.to-r.from >= n {
			frame := b[r.from : r.from+n : r.from+n]
			r.from += n
			return frame, nil
		}
		r.compact(b)
		got, err := r.src.Read(b[r.to:])
		r.to += got
		if err == io.EOF && r.to > 0 {
			err = io.ErrUnexpectedEOF
		}
		if err != nil && got == 0 {
			return nil, err
		}
	}
}

// compact moves what is left to the front and wipes what was taken.
func (r *reader) compact(b []byte) {
	if r.from == 0 {
		return
	}
	left := copy(b, b[r.from:r.to])
	secret.Wipe(b[left:r.to])
	r.from, r.to = 0, left
}

func (r *reader) end() { r.buf.Destroy() }
