// Package canon is the one encoding of everything that is signed or hashed:
// CBOR in core deterministic form (RFC 8949, section 4.2.1), decoded strictly.
package canon

import (
	"bytes"
	"fmt"

	"github.com/fxamacker/cbor/v2"
)

// MaxSize is the longest encoding that Unmarshal accepts, in bytes.
const MaxSize = 8 << 20

var enc, dec = modes()

func modes() (cbor.EncMode, cbor.DecMode) {
	e := cbor.CoreDetEncOptions()
	e.NilContainers = cbor.NilContainerAsEmpty
	em, err := e.EncMode()
	if err != nil {
		panic(err) // constant options
	}
	dm, err := cbor.DecOptions{
		DupMapKey:         cbor.DupMapKeyEnforcedAPF,
		IndefLength:       cbor.IndefLengthForbidden,
		TagsMd:            cbor.TagsForbidden,
		ExtraReturnErrors: cbor.ExtraDecErrorUnknownField,
		FieldNameMatching: cbor.FieldNameMatchingCaseSensitive,
		UTF8:              cbor.UTF8RejectInvalid,
		NaN:               cbor.NaNDecodeForbidden,
		Inf:               cbor.InfDecodeForbidden,
		MaxNestedLevels:   16,
		MaxArrayElements:  100_000,
		MaxMapPairs:       10_000,
	}.DecMode()
	if err != nil {
		panic(err) // constant options
	}
	return em, dm
}

// Marshal returns the one encoding of v. It panics on a type that has none,
// which is a mistake in the program, never in data.
func Marshal(v any) []byte {
	b, err := enc.Marshal(v)
	if err != nil {
		panic(fmt.Sprintf("canon: %T has no encoding: %v", v, err))
	}
	return b
}

// Unmarshal decodes exactly what Marshal writes and refuses everything else:
// unknown, missing-order or duplicate fields, other encodings of the same value,
// trailing bytes.
func Unmarshal(b []byte, v any) error {
	if len(b) > MaxSize {
		return fmt.Errorf("canon: %d bytes exceed the limit of %d", len(b), MaxSize)
	}
	if err := dec.Unmarshal(b, v); err != nil {
		return fmt.Errorf("canon: %w", err)
	}
	again, err := enc.Marshal(v)
	if err != nil {
		return fmt.Errorf("canon: %w", err)
	}
	if !bytes.Equal(again, b) {
		return fmt.Errorf("canon: not in deterministic form")
	}
	return nil
}
