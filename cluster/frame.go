package cluster

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
)

// The forward protocol (ALPN conclave-forward/1). Either side sends frames: a
// length of 4 bytes, big endian, then that many bytes of canonical CBOR. The
// accepting side sends a greeting once it has authenticated the caller; then the
// caller sends requests and the other side answers each with a response of the
// same number, in any order.

// maxFrame bounds a frame's body in bytes.
const maxFrame = canon.MaxSize

// MaxCommand is the longest signed command that Propose takes, in bytes.
const MaxCommand = state.MaxCommand

// maxRequest bounds the body of a request in bytes.
const maxRequest = MaxCommand + 1024

// op is what a request asks for.
type op uint8

const (
	opPropose op = 1 // append Raw to the log; answered when it is applied at the leader
	opBarrier op = 2 // prove leadership now; Index: all that was committed before
	opProof   op = 3 // the leader's last proof of leadership: Index, and its Age
	opHash    op = 4 // Hash: the state's hash at log size Size, empty if not known
	opPing    op = 5 // Info: pingInfo

	opMark   op = 20 // Raw: the caller's mark, to be kept
	opRecall op = 21 // Info: keptMark of the caller

	opRecords op = 22 // Info: what Config.Records gives from leaf Size on
)

// status says how a request ended.
type status uint8

const (
	statusOK        status = 1
	statusNotLeader status = 2 // certainly nothing was appended
	statusError     status = 3 // Kind, Message and Fix say why
)

// greeting is the first frame from the accepting side.
type greeting struct {
	Node    string `cbor:"node"`
	Cluster string `cbor:"cluster"`

	// Of an epoch after the first: what custodians approved for it to begin.
	Epoch    uint64 `cbor:"epoch,omitempty"`
	Recovery []byte `cbor:"recovery,omitempty"`

	// To a node that was removed: by which proposal. Nothing follows.
	Removed string `cbor:"removed,omitempty"`
}

// maxGreeting bounds the body of a greeting in bytes.
const maxGreeting = state.MaxApproved + 4096

// request is a frame from the calling side.
type request struct {
	ID      uint64 `cbor:"id"`
	Op      op     `cbor:"op"`
	Timeout int64  `cbor:"timeout"` // milliseconds that the caller waits
	Raw     []byte `cbor:"raw"`
	Size    uint64 `cbor:"size"`
}

// expect writes into the request how long its caller waits.
func (r *request) expect(ctx context.Context) {
	if deadline, ok := ctx.Deadline(); ok {
		r.Timeout = max(time.Until(deadline).Milliseconds(), 1)
	}
}

// limit returns how long the request may take.
func (r *request) limit() time.Duration {
	if r.Timeout > 0 && r.Timeout < maxRequestTime.Milliseconds() {
		return time.Duration(r.Timeout) * time.Millisecond
	}
	return maxRequestTime
}

// response is a frame from the accepting side.
type response struct {
	ID      uint64  `cbor:"id"`
	Status  status  `cbor:"status"`
	Kind    uint8   `cbor:"kind"`
	Message string  `cbor:"message"`
	Fix     string  `cbor:"fix"`
	Result  outcome `cbor:"result"`
	Index   uint64  `cbor:"index"`
	Age     int64   `cbor:"age"` // nanoseconds
	Hash    []byte  `cbor:"hash"`

	// A node of a release that does not know a field refuses the frame: later fields
	// are in answers to later operations only.
	Info []byte `cbor:"info,omitempty"`
}

// outcome is state.Result on the wire.
type outcome struct {
	Index     uint64  `cbor:"index"`
	Kind      uint8   `cbor:"kind"`
	Message   string  `cbor:"message"`
	Duplicate bool    `cbor:"duplicate"`
	Leaf      []byte  `cbor:"leaf"`
	Events    []event `cbor:"events"`
}

// event is state.Event on the wire, with the fields that the first release had: nodes go
// by what they have made of a command themselves.
type event struct {
	Type      string `cbor:"type"`
	Keyring   string `cbor:"keyring"`
	Key       string `cbor:"key"`
	Proposal  string `cbor:"proposal"`
	Node      string `cbor:"node"`
	Custodian string `cbor:"custodian"`
	Version   uint32 `cbor:"version"`
}

func toOutcome(r state.Result) outcome {
	o := outcome{Index: r.Index, Kind: uint8(r.Kind), Message: r.Message, Duplicate: r.Duplicate, Leaf: r.Leaf}
	for _, e := range r.Events {
		o.Events = append(o.Events, event{e.Type, e.Keyring, e.Key, e.Proposal, e.Node, e.Custodian, e.Version})
	}
	return o
}

func (o outcome) result() state.Result {
	r := state.Result{Index: o.Index, Kind: kms.Kind(o.Kind), Message: o.Message, Duplicate: o.Duplicate, Leaf: o.Leaf}
	for _, e := range o.Events {
		r.Events = append(r.Events, state.Event{Type: e.Type, Keyring: e.Keyring, Key: e.Key, Proposal: e.Proposal, Node: e.Node,
			Custodian: e.Custodian, Version: e.Version})
	}
	return r
}

// writeFrame sends v in one frame with one Write.
func writeFrame(w io.Writer, v any) error {
	body := canon.Marshal(v)
	if len(body) > maxFrame {
		return kms.Errorf(kms.TooLarge, "message of %d bytes exceeds the limit of %d between nodes", len(body), maxFrame)
	}
	b := binary.BigEndian.AppendUint32(make([]byte, 0, 4+len(body)), uint32(len(body)))
	_, err := w.Write(append(b, body...))
	return err
}

// readFrame reads one frame of at most limit bytes into v. io.EOF means that the
// stream ended between frames. Memory grows with what has arrived, not with what
// the length field claims.
func readFrame(r io.Reader, limit int, v any) error {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return err
	}
	n := binary.BigEndian.Uint32(head[:])
	if uint64(n) > uint64(limit) {
		return kms.Errorf(kms.TooLarge, "frame of %d bytes exceeds the limit of %d", n, limit)
	}
	body, err := io.ReadAll(io.LimitReader(r, int64(n)))
	if err != nil {
		return err
	}
	if len(body) != int(n) {
		return io.ErrUnexpectedEOF
	}
	if err := canon.Unmarshal(body, v); err != nil {
		return fmt.Errorf("frame: %w", err)
	}
	return nil
}
