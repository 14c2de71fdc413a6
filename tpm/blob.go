package tpm

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"

	"github.com/google/go-tpm/tpm2"
)

// The wrapped key, version 1:
//
//	version byte 1
//	TPM2B_PUBLIC   two-byte length, then the public area of the sealed object
//	TPM2B_PRIVATE  two-byte length, then its encrypted sensitive area
//
// The sealed data is SHA-256(aad) followed by 1 to 96 bytes of key, which
// together fill the 128 bytes that a TPM seals at most.
const (
	blobVersion   = 1
	maxWrappedKey = 96
	maxPrivate    = 512
)

func encodeBlob(pub, priv []byte) []byte {
	b := make([]byte, 0, 5+len(pub)+len(priv))
	b = append(b, blobVersion)
	b = binary.BigEndian.AppendUint16(b, uint16(len(pub)))
	b = append(b, pub...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(priv)))
	return append(b, priv...)
}

// parseBlob splits a wrapped key and refuses every public area but that of a
// sealed data object fixed to its TPM and parent, with no policy and no scheme.
func (s *suite) parseBlob(b []byte) (pub, priv []byte, ok bool) {
	if len(b) < 1 || b[0] != blobVersion {
		return nil, nil, false
	}
	pub, rest, ok := sized(b[1:])
	if !ok || !s.sealedPublic(pub) {
		return nil, nil, false
	}
	priv, rest, ok = sized(rest)
	if !ok || len(rest) != 0 || len(priv) == 0 || len(priv) > maxPrivate {
		return nil, nil, false
	}
	return pub, priv, true
}

// sealedPublic compares with the marshalled template, whose last two bytes are
// the length of the empty unique field.
func (s *suite) sealedPublic(pub []byte) bool {
	want := tpm2.Marshal(s.sealed())
	want = binary.BigEndian.AppendUint16(want[:len(want)-2], uint16(s.digest))
	return len(pub) == len(want)+s.digest && bytes.HasPrefix(pub, want)
}

func sized(b []byte) (part, rest []byte, ok bool) {
	if len(b) < 2 {
		return nil, nil, false
	}
	n := int(binary.BigEndian.Uint16(b))
	if len(b)-2 < n {
		return nil, nil, false
	}
	return b[2 : 2+n], b[2+n:], true
}

func aadHash(aad []byte) []byte {
	h := sha256.Sum256(aad)
	return h[:]
}
