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
	"sync/atomic"
)

const redacted = "[secret]"

// Bytes is a secret byte string in locked memory. The zero value and nil are
// empty secrets. A Bytes must not be copied. It may be read by many goroutines;
// none may still read it when it is destroyed.
//
// The one field is a pointer so that even reflection (fmt on a struct that
// holds a Bytes) comes upon an address and not upon the bytes.
type Bytes struct {
	slot atomic.Pointer[slot]
}

// slot is a piece of the arena, its length the size class; n bytes are used.
type slot struct {
	mem []byte
	n   int
}

// ErrTooLarge is returned for a secret of more than MaxLen bytes.
var ErrTooLarge = errors.New("secret: longer than 1 MiB")

// MaxLen is the longest secret that can be held.
const MaxLen = 1 << 20

// New returns a zeroed secret of n bytes in locked memory. It fails when the
// operating system refuses to lock more memory (RLIMIT_MEMLOCK), and with
// ErrTooLarge when n is negative or more than MaxLen.
func New(n int) (*Bytes, error) {
	if n < 0 || n > MaxLen {
		return nil, ErrTooLarge
	}
	s := &Bytes{}
	if n == 0 {
		return s, nil
	}
	mem, err := arena.get(n)
	if err != nil {
		return nil, err
	}
	s.slot.Store(&slot{mem: mem, n: n})
	runtime.SetFinalizer(s, (*Bytes).Destroy)
	return s, nil
}

// Copy returns a secret with the contents of b, which stays as it is.
func Copy(b []byte) (*Bytes, error) {
	s, err := New(len(b))
	if err != nil {
		return nil, err
	}
	copy(s.Reveal(), b)
	return s, nil
}

// Move returns a secret with the contents of b and wipes b, also on failure.
func Move(b []byte) (*Bytes, error) {
	defer Wipe(b)
	return Copy(b)
}

// Len returns the number of bytes, 0 after Destroy.
func (s *Bytes) Len() int { return len(s.Reveal()) }

// Reveal returns the bytes themselves, not a copy. They are valid until Destroy;
// the caller must not retain them and must keep s reachable while using them
// (runtime.KeepAlive), or the garbage collector may destroy s.
func (s *Bytes) Reveal() []byte {
	if s == nil {
		return nil
	}
	p := s.slot.Load()
	if p == nil {
		return nil
	}
	return p.mem[:p.n:p.n]
}

// Equal compares in constant time; secrets of different lengths are unequal,
// and a destroyed secret equals only an empty one.
func (s *Bytes) Equal(o *Bytes) bool {
	equal := subtle.ConstantTimeCompare(s.Reveal(), o.Reveal()) == 1
	runtime.KeepAlive(s)
	runtime.KeepAlive(o)
	return equal
}

// Destroy zeroises the bytes and gives their memory back. It may be called
// more than once, from several goroutines, and on nil.
func (s *Bytes) Destroy() {
	if s == nil {
		return
	}
	p := s.slot.Swap(nil)
	if p == nil {
		return
	}
	runtime.SetFinalizer(s, nil)
	Wipe(p.mem)
	arena.put(p.mem)
}

// Wipe zeroises b. It is never inlined, so that the compiler cannot see that
// nobody reads the zeros and leave them out.
//
//go:noinline
func Wipe(b []byte) { clear(b) }

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
