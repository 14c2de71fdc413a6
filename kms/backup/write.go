package backup

import (
	"bufio"
	"context"
	"crypto/sha512"
	"io"
	"time"

	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
)

// Write writes a backup of the state, made by a node of it at a time of its own
// clock and signed by its device. It holds a bounded part of the state in memory
// beside the state itself. Errors are w's and sign's.
func Write(ctx context.Context, w io.Writer, s *state.State, node, program string, now time.Time, sign Signer) (Header, error) {
	h, err := describe(s, node)
	if err != nil {
		return h, err
	}
	h.Created, h.Program = now.UnixMilli(), program
	sum := sha512.New()
	all := io.MultiWriter(w, sum)
	if _, err := io.WriteString(all, magic); err != nil {
		return h, err
	}
	if err := writeFrame(all, frameHeader, canon.Marshal(h)); err != nil {
		return h, err
	}
	if err := writeFrame(all, frameGenesis, s.SignedGenesis().Marshal()); err != nil {
		return h, err
	}
	pieces := &pieceWriter{w: all}
	buffered := bufio.NewWriterSize(pieces, chunk)
	hash, err := s.SnapshotHash(buffered)
	if err != nil {
		return h, err
	}
	if err := buffered.Flush(); err != nil {
		return h, err
	}
	if err := ctx.Err(); err != nil {
		return h, err
	}
	t := Trailer{State: hash[:], Size: pieces.size}
	digest, err := pqc.Digest(pqc.SuiteID(h.Suite), h.message(t, sum.Sum(nil)), []byte(Context))
	if err != nil {
		return h, err
	}
	before := sum.Sum(nil)
	if t.Signature, err = sign(ctx, digest); err != nil {
		return h, err
	}
	if err := h.verify(t, before); err != nil {
		return h, err // the device's key is not the one that the cluster knows
	}
	return h, writeFrame(w, frameTrailer, canon.Marshal(t))
}

// pieceWriter writes each Write as one frame of the state, or several.
type pieceWriter struct {
	w    io.Writer
	size uint64
}

// Write implements io.Writer.
func (p *pieceWriter) Write(b []byte) (int, error) {
	n := len(b)
	for len(b) > 0 {
		piece := b[:min(len(b), maxChunk)]
		if err := writeFrame(p.w, frameState, piece); err != nil {
			return 0, err
		}
		p.size += uint64(len(piece))
		b = b[len(piece):]
	}
	return n, nil
}
