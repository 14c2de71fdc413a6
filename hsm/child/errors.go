package child

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"unicode"

	"github.com/conclave-kms/conclave/hsm"
)

// kinds are the errors that keep their identity across the pipe, by number; 0 is no
// error. New ones go to the end.
var kinds = []error{nil, hsm.ErrUnavailable, hsm.ErrPIN, hsm.ErrNotProvisioned, hsm.ErrProvisioned, hsm.ErrUnsafeToken,
	hsm.ErrUnsupported, hsm.ErrModule, hsm.ErrTokenNotFound, hsm.ErrInvalid, context.Canceled, context.DeadlineExceeded}

const maxErrorText = 1000 // bytes

// remoteError is an error of the other process: its text and its kind.
type remoteError struct {
	text string
	kind error
}

func (e *remoteError) Error() string { return e.text }
func (e *remoteError) Unwrap() error { return e.kind }

// errorReply is the reply that carries err.
func errorReply(err error) message {
	kind := byte(1)
	for i, k := range kinds {
		if i > 0 && errors.Is(err, k) {
			kind = byte(i)
			break
		}
	}
	return message{op: opReply, arg: kind, n: 1, parts: [maxParts][]byte{[]byte(printable(err.Error(), maxErrorText))}}
}

// replyError returns the error in a reply, nil when it carries none.
func replyError(m message) error {
	switch {
	case m.arg == 0:
		return nil
	case int(m.arg) >= len(kinds) || m.n != 1 || len(m.parts[0]) > maxErrorText:
		return errFrame
	}
	return &remoteError{printable(string(m.parts[0]), maxErrorText), kinds[m.arg]}
}

// printable makes text from elsewhere fit for one line of a log.
func printable(s string, limit int) string {
	s = strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.ToValidUTF8(s, "?"))
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit], "")
	}
	return s
}

func unavailablef(format string, a ...any) error {
	return fmt.Errorf("%w: %s", hsm.ErrUnavailable, fmt.Sprintf(format, a...))
}

func invalidf(format string, a ...any) error {
	return fmt.Errorf("%w: %s", hsm.ErrInvalid, fmt.Sprintf(format, a...))
}

// contextError reports a call that its context ended, as package hsm does.
func contextError(op string, err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("%w: %s: %w", hsm.ErrUnavailable, op, err)
	}
	return fmt.Errorf("hsm: %s: %w", op, err)
}
