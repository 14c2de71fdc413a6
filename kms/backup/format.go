package backup

import (
	"context"
	"encoding/binary"
	"errors"
	"hash"
	"io"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
)

// Context is the signature context (pqc.Verify) of a node's signature over a backup.
const Context = "conclave/backup/v1"

// Format is the format of the backups of this program.
const Format uint8 = 1

const magic = "conclave-backup/1\n"

// Frame types.
const (
	frameHeader  byte = 'H'
	frameGenesis byte = 'G'
	frameState   byte = 'S'
	frameTrailer byte = 'T'
)

// Limits in bytes.
const (
	chunk      = 256 << 10 // pieces of the snapshot as written
	maxChunk   = 1 << 20   // as read
	maxHeader  = 16 << 10
	maxTrailer = 4 << 10
)

// Header says what a backup is of. All of it can be checked against the state, but
// for the time and the program.
type Header struct {
	Format  uint8  `cbor:"format" json:"format"`
	Cluster string `cbor:"cluster" json:"cluster"` // genesis identity
	Lineage string `cbor:"lineage" json:"lineage"` // of the history
	Epoch   uint64 `cbor:"epoch" json:"epoch"`
	Index   uint64 `cbor:"index" json:"index"` // of the last command in the state
	Clock   int64  `cbor:"clock" json:"clock"` // cluster clock, Unix milliseconds
	LogSize uint64 `cbor:"log-size" json:"log_size"`
	LogRoot []byte `cbor:"log-root" json:"log_root"`
	Node    string `cbor:"node" json:"node"` // that made it
	Root    uint32 `cbor:"root" json:"root"` // number of its hardware root
	Suite   uint16 `cbor:"suite" json:"suite"`
	Signing []byte `cbor:"signing" json:"signing"` // the root's signing key, SEC1 uncompressed
	Created int64  `cbor:"created" json:"created"` // by the node's own clock, Unix milliseconds
	Program string `cbor:"program" json:"program"` // release that made it
}

// Trailer closes a backup.
type Trailer struct {
	State     []byte `cbor:"state"` // SHA-256 over the state's records, as in the snapshot's end record
	Size      uint64 `cbor:"size"`  // bytes of the snapshot
	Signature []byte `cbor:"signature"`
}

// statement is what the node's device signs.
type statement struct {
	Cluster string `cbor:"cluster"`
	Node    string `cbor:"node"`
	State   []byte `cbor:"state"`
	Size    uint64 `cbor:"size"`
	Before  []byte `cbor:"before"` // SHA-512 of all bytes before the trailer's frame
}

func (h Header) message(t Trailer, before []byte) []byte {
	return canon.Marshal(statement{Cluster: h.Cluster, Node: h.Node, State: t.State, Size: t.Size, Before: before})
}

// verify checks the node's signature with the key that the header names.
func (h Header) verify(t Trailer, before []byte) error {
	if err := pqc.Verify(pqc.SuiteID(h.Suite), h.Signing, h.message(t, before), []byte(Context), t.Signature); err != nil {
		return kms.Wrap(kms.BadSignature, err, "the backup's signature by node "+h.Node+" does not verify: the file was altered", "take another copy")
	}
	return nil
}

// describe returns the header for a state.
func describe(s *state.State, node string) (Header, error) {
	n, ok := s.Node(node)
	if !ok {
		return Header{}, kms.Errorf(kms.Invalid, "%q is no node of the cluster", node)
	}
	return Header{
		Format: Format, Cluster: s.Cluster(), Lineage: s.Lineage(), Epoch: s.Epoch(), Index: s.Index(), Clock: s.Clock(),
		LogSize: s.LogSize(), LogRoot: s.LogRoot(), Node: node, Root: n.Root, Suite: n.SigningSuite, Signing: n.Signing,
	}, nil
}

// Signer has the node's device sign a digest and returns r‖s.
type Signer func(ctx context.Context, digest []byte) ([]byte, error)

func writeFrame(w io.Writer, kind byte, b []byte) error {
	frame := binary.BigEndian.AppendUint32([]byte{kind}, uint32(len(b)))
	if _, err := w.Write(frame); err != nil {
		return err
	}
	_, err := w.Write(b)
	return err
}

var damagedFix = "take another copy"

func damaged(err error) error {
	return kms.Wrap(kms.Invalid, err, "the backup ends early or is damaged", damagedFix)
}

// frameReader reads frames and hashes all before the trailer.
type frameReader struct {
	r    io.Reader
	hash hash.Hash
}

// next returns the next frame. It allocates what arrives, up to limit.
func (f *frameReader) next(limit func(kind byte) int) (byte, []byte, error) {
	var head [5]byte
	if _, err := io.ReadFull(f.r, head[:]); err != nil {
		return 0, nil, damaged(err)
	}
	kind, size := head[0], binary.BigEndian.Uint32(head[1:])
	if int64(size) > int64(limit(kind)) {
		return 0, nil, kms.Errorf(kms.Invalid, "the backup is damaged: a part of type %q with %d bytes is not in order here", kind, size)
	}
	b := make([]byte, size)
	if _, err := io.ReadFull(f.r, b); err != nil {
		return 0, nil, damaged(err)
	}
	if kind != frameTrailer {
		f.hash.Write(head[:])
		f.hash.Write(b)
	}
	return kind, b, nil
}

// only allows frames of one kind.
func only(want byte, limit int) func(byte) int {
	return func(kind byte) int {
		if kind != want {
			return -1
		}
		return limit
	}
}

func (f *frameReader) begin() (Header, error) {
	line := make([]byte, len(magic))
	if _, err := io.ReadFull(f.r, line); err != nil || string(line) != magic {
		return Header{}, kms.Errorf(kms.Invalid, "this is no backup of a Conclave cluster, or one of another format")
	}
	f.hash.Write(line)
	_, b, err := f.next(only(frameHeader, maxHeader))
	if err != nil {
		return Header{}, err
	}
	var h Header
	if err := canon.Unmarshal(b, &h); err != nil {
		return Header{}, damaged(err)
	}
	if h.Format != Format {
		return Header{}, kms.Errorf(kms.Invalid, "backups of format %d are not known; this program knows %d", h.Format, Format)
	}
	return h, nil
}

func (f *frameReader) genesis() ([]byte, error) {
	_, b, err := f.next(only(frameGenesis, 2*state.MaxGenesis))
	return b, err
}

// stateReader is the snapshot in the state frames. At the first frame of another
// kind it keeps that one and ends.
type stateReader struct {
	f    *frameReader
	rest []byte
	size uint64
	last []byte // trailer, once it was read
	err  error
}

// Read implements io.Reader.
func (s *stateReader) Read(p []byte) (int, error) {
	for len(s.rest) == 0 {
		if s.last != nil {
			return 0, io.EOF
		}
		if s.err != nil {
			return 0, s.err
		}
		s.advance()
	}
	n := copy(p, s.rest)
	s.rest = s.rest[n:]
	return n, nil
}

func (s *stateReader) advance() {
	kind, b, err := s.f.next(func(kind byte) int {
		switch kind {
		case frameState:
			return maxChunk
		case frameTrailer:
			return maxTrailer
		}
		return -1
	})
	switch {
	case err != nil:
		s.err = err
	case kind == frameTrailer:
		s.last = b
	default:
		s.rest = b
		s.size += uint64(len(b))
	}
}

// trailer returns the trailer after the snapshot was read, and checks that it is the
// end of the file and fits what came before.
func (s *stateReader) trailer(h Header, sum []byte) (Trailer, error) {
	var t Trailer
	if n, err := io.ReadFull(s, make([]byte, 1)); n > 0 || !errors.Is(err, io.EOF) {
		if s.err != nil {
			return t, s.err
		}
		return t, kms.Errorf(kms.Invalid, "the backup is damaged: bytes after the state")
	}
	before := s.f.hash.Sum(nil)
	if err := canon.Unmarshal(s.last, &t); err != nil {
		return t, damaged(err)
	}
	if string(t.State) != string(sum) || t.Size != s.size {
		return t, kms.Errorf(kms.Invalid, "the backup is damaged: its trailer is about another state")
	}
	if n, err := io.ReadFull(s.f.r, make([]byte, 1)); n > 0 || !errors.Is(err, io.EOF) {
		return t, kms.Errorf(kms.Invalid, "the backup is damaged: bytes after its end")
	}
	return t, h.verify(t, before)
}
