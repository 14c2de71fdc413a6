package kms

import (
	"errors"
	"fmt"
)

// Kind says what went wrong in a way that a protocol can map to its own codes.
// A Kind is itself an error, so that errors.Is(err, kms.NotFound) works.
type Kind uint8

// The kinds. The numbers are part of recorded outcomes: append only.
const (
	Internal        Kind = iota + 1 // a bug or an impossible condition
	Invalid                         // the request is malformed or out of range
	Unauthenticated                 // no or no acceptable identity
	Denied                          // the identity may not do this
	NotFound                        // the thing does not exist
	Exists                          // the thing exists already
	Conflict                        // the thing changed meanwhile, or is in another state
	NeedsApproval                   // a quorum must approve first
	Expired                         // too old: a proposal, a command
	Replayed                        // seen before
	BadSignature                    // a signature does not verify
	OpenFailed                      // a ciphertext, wrapped key or MAC does not open or verify; never says why
	Unavailable                     // a device, the leader or the log cannot be reached now; try again
	Stale                           // this node has been cut off for longer than the keyring allows
	NotResident                     // this node may not open this keyring
	Unknown                         // the outcome of a write is unknown; ask again with the same idempotency key
	TooLarge                        // the request exceeds a limit
	ReadOnly                        // the node refuses changes (disk nearly full, audit log not writable)
)

var kindNames = [...]string{
	Internal: "internal", Invalid: "invalid", Unauthenticated: "unauthenticated", Denied: "denied",
	NotFound: "not-found", Exists: "exists", Conflict: "conflict", NeedsApproval: "needs-approval",
	Expired: "expired", Replayed: "replayed", BadSignature: "bad-signature", OpenFailed: "open-failed",
	Unavailable: "unavailable", Stale: "stale", NotResident: "not-resident", Unknown: "unknown-outcome",
	TooLarge: "too-large", ReadOnly: "read-only",
}

// String returns the kind's name, as used in problem types and recorded outcomes.
func (k Kind) String() string {
	if int(k) < len(kindNames) && kindNames[k] != "" {
		return kindNames[k]
	}
	return fmt.Sprintf("kind-%d", uint8(k))
}

// Error makes a Kind usable as the target of errors.Is.
func (k Kind) Error() string { return k.String() }

// Error is an error with a kind, a message for the person who reads it, and
// where there is one the next step to take. Messages carry no key material and
// no internal detail; Err is for logs and errors.Is only.
type Error struct {
	Kind Kind
	Msg  string // what happened
	Fix  string // what to do next, may be empty
	Err  error  // the cause, may be nil; not shown to callers of the API
}

// Error returns the message and the next step.
func (e *Error) Error() string {
	s := e.Msg
	if e.Fix != "" {
		s += "; " + e.Fix
	}
	return s
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Is reports whether target is the error's Kind.
func (e *Error) Is(target error) bool {
	k, ok := target.(Kind)
	return ok && k == e.Kind
}

// Errorf returns an *Error of the kind.
func Errorf(k Kind, format string, args ...any) error {
	return &Error{Kind: k, Msg: fmt.Sprintf(format, args...)}
}

// Wrap returns an *Error of the kind with a cause that stays internal.
func Wrap(k Kind, cause error, msg, fix string) error {
	return &Error{Kind: k, Msg: msg, Fix: fix, Err: cause}
}

// KindOf returns the kind of err: of the outermost *Error or Kind in its chain,
// Internal for any other error, 0 for nil.
func KindOf(err error) Kind {
	if err == nil {
		return 0
	}
	var e *Error
	if errors.As(err, &e) {
		return e.Kind
	}
	var k Kind
	if errors.As(err, &k) {
		return k
	}
	return Internal
}

// ErrOpen is the one error for every failure to open a ciphertext, a wrapped key
// or to verify a MAC: it never says what was wrong.
var ErrOpen error = &Error{Kind: OpenFailed, Msg: "cannot be opened with this key and context"}
