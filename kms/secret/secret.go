// Package secret holds key material in memory that is locked against swapping,
// kept out of core dumps, redacted wherever it could be printed, and zeroised
// when it is destroyed.
//
// The guarantee covers the bytes held here. What the standard library derives
// from them (an expanded AES key schedule, an HMAC pad) lives in ordinary
// garbage-collected memory until it is overwritten.
package secret

import (
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"runtime"
)

const redacted = "[secret]"

// Bytes is a secret byte string in locked memory. The zero value and nil are
// empty secrets. A Bytes must not be copied; it is not safe to Destroy one that
// another goroutine still reads.
type Bytes struct {
	mem  []byte // the slot in the arena, its capacity the size class
	data []byte // mem[:n]
}

// ErrTooLarge is returned for a secret of more than MaxLen bytes.
var ErrTooLarge = errors.New("secret: longer than 1 MiB")

// MaxLen is the longest secret that can be held.
const MaxLen = 1 << 20

// New returns a zeroed secret of n bytes in locked memory. It fails when the
// operating system refuses to lock more memory (RLIMIT_MEMLOCK).
func New(n int) (*Bytes, error) {
	if n < 0 || n > MaxLen {
		return nil, ErrTooLarge
	}
	if n == 0 {
		return &Bytes{}, nil
	}
	mem, err := arena.get(n)
	if err != nil {
		return nil, err
	}
	s := &Bytes{mem: mem, data: mem[:n:n]}
	runtime.SetFinalizer(s, (*Bytes).Destroy)
	return s, nil
}

// Copy returns a secret with the contents of b, which stays as it is.
func Copy(b []byte) (*Bytes, error) {
	s, err := New(len(b))
	if err != nil {
		return nil, err
	}
	copy(s.data, b)
	return s, nil
}

// Move returns a secret with the contents of b and wipes b, also on failure.
func Move(b []byte) (*Bytes, error) {
	defer Wipe(b)
	return Copy(b)
}

// Len returns the number of bytes, 0 after Destroy.
func (s *Bytes) Len() int {
	if s == nil {
		return 0
	}
	return len(s.data)
}

// Reveal returns the bytes themselves, not a copy. They are valid until Destroy;
// the caller must not retain them and must keep s reachable while using them.
func (s *Bytes) Reveal() []byte {
	if s == nil {
		return nil
	}
	return s.data
}

// Equal compares in constant time; secrets of different lengths are unequal.
func (s *Bytes) Equal(o *Bytes) bool {
	return subtle.ConstantTimeCompare(s.Reveal(), o.Reveal()) == 1
}

// Destroy zeroises the bytes and gives their memory back. It may be called
// more than once and on nil.
func (s *Bytes) Destroy() {
	if s == nil || s.mem == nil {
		return
	}
	mem := s.mem
	s.mem, s.data = nil, nil
	runtime.SetFinalizer(s, nil)
	Wipe(mem)
	arena.put(mem)
}

// Wipe zeroises b.
func Wipe(b []byte) {
	clear(b)
	runtime.KeepAlive(&b)
}

// String returns a fixed text, never the secret.
func (s *Bytes) String() string { return redacted }

// GoString returns a fixed text, never the secret.
func (s *Bytes) GoString() string { return redacted }

// Format prints a fixed text for every verb.
func (s *Bytes) Format(f fmt.State, _ rune) { _, _ = io.WriteString(f, redacted) }

// LogValue implements slog.LogValuer.
func (s *Bytes) LogValue() slog.Value { return slog.StringValue(redacted) }

// MarshalJSON returns the fixed text as a JSON string.
func (s *Bytes) MarshalJSON() ([]byte, error) { return json.Marshal(redacted) }

// MarshalText returns the fixed text.
func (s *Bytes) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// MarshalBinary always fails: a secret is never serialised by accident.
func (s *Bytes) MarshalBinary() ([]byte, error) {
	return nil, errors.New("secret: refusing to serialise")
}
