package child

import (
	"encoding/binary"
	"errors"

	"github.com/conclave-kms/conclave/kms/secret"
)

// A frame is
//
//	length (4, of the whole frame) ‖ op (1) ‖ arg (1) ‖ parts (1) ‖ 0 (1) ‖ id (8) ‖ key (8) ‖ parts × (length (4) ‖ bytes)
//
// with big-endian numbers. A reply has the id of its request and the op opReply; arg is
// 0 or the kind of the error whose text is the one part.
const (
	protocol   = 1         // version, in key of opOpen
	headerSize = 24        // bytes before the parts
	maxFrame   = 128 << 10 // bytes; a MAC's message and the AAD of Wrap have up to 64 KiB
	maxParts   = 6
	maxList    = 1024
)

// op says what a frame asks for.
type op byte

const (
	opReply op = iota
	opOpen
	opECDH
	opSign
	opWrap
	opUnwrap
	opRandom
	opCheck
	opAttributes
	opLoadHMAC
	opLoadSigner
	opUse
	opUnload
	opGenerateHMAC
	opGenerateSigner
	opRewrap
	opEnd // not an op
)

var opNames = [opEnd]string{"reply", "open", "ecdh", "sign", "wrap", "unwrap", "random", "check", "attributes",
	"load", "load", "use of a loaded key", "unload", "generate", "generate", "rewrap"}

// message is a frame taken apart. The parts are slices of the frame.
type message struct {
	op    op
	arg   byte
	id    uint64
	key   uint64
	n     int
	parts [maxParts][]byte

	held *secret.Bytes // what a part lies in, to be destroyed when the frame has gone
}

func request(o op, key uint64, parts ...[]byte) message {
	m := message{op: o, key: key, n: len(parts)}
	copy(m.parts[:], parts)
	return m
}

var errFrame = errors.New("malformed frame")

func (m *message) size() int {
	n := headerSize
	for _, p := range m.parts[:m.n] {
		n += 4 + len(p)
	}
	return n
}

// append writes the frame behind b.
func (m *message) append(b []byte) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(m.size()))
	b = append(b, byte(m.op), m.arg, byte(m.n), 0)
	b = binary.BigEndian.AppendUint64(b, m.id)
	b = binary.BigEndian.AppendUint64(b, m.key)
	for _, p := range m.parts[:m.n] {
		b = binary.BigEndian.AppendUint32(b, uint32(len(p)))
		b = append(b, p...)
	}
	return b
}

// frameLength returns the length of the frame with which b begins, 0 when b is too
// short to tell.
func frameLength(b []byte) (int, error) {
	if len(b) < 4 {
		return 0, nil
	}
	n := binary.BigEndian.Uint32(b)
	if n < headerSize || n > maxFrame {
		return 0, errFrame
	}
	return int(n), nil
}

// frameID returns the id in a whole frame.
func frameID(frame []byte) uint64 { return binary.BigEndian.Uint64(frame[8:]) }

// parse takes a whole frame apart and refuses whatever append does not write.
func parse(frame []byte) (message, error) {
	var m message
	n, err := frameLength(frame)
	if err != nil || n == 0 || n != len(frame) {
		return m, errFrame
	}
	m.op, m.arg, m.n = op(frame[4]), frame[5], int(frame[6])
	m.id, m.key = frameID(frame), binary.BigEndian.Uint64(frame[16:])
	if m.op >= opEnd || m.n > maxParts || frame[7] != 0 {
		return message{}, errFrame
	}
	rest := frame[headerSize:]
	for i := range m.n {
		if m.parts[i], rest, err = cut(rest); err != nil {
			return message{}, err
		}
	}
	if len(rest) != 0 {
		return message{}, errFrame
	}
	return m, nil
}

// cut takes a length-prefixed byte string from the front of b.
func cut(b []byte) (part, rest []byte, err error) {
	if len(b) < 4 {
		return nil, nil, errFrame
	}
	n := binary.BigEndian.Uint32(b)
	if uint64(n) > uint64(len(b)-4) {
		return nil, nil, errFrame
	}
	return b[4 : 4+n : 4+n], b[4+n:], nil
}

// joinList makes one part of many byte strings.
func joinList(list [][]byte) []byte {
	var b []byte
	for _, p := range list {
		b = binary.BigEndian.AppendUint32(b, uint32(len(p)))
		b = append(b, p...)
	}
	return b
}

// splitList is the way back. The results are slices of b.
func splitList(b []byte) ([][]byte, error) {
	var list [][]byte
	for len(b) > 0 {
		part, rest, err := cut(b)
		if err != nil || len(list) == maxList {
			return nil, errFrame
		}
		list, b = append(list, part), rest
	}
	return list, nil
}
