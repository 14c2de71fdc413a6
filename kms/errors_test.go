package kms

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
)

// TestKindNumbers: the numbers and names stand in recorded outcomes.
func TestKindNumbers(t *testing.T) {
	names := []string{
		1: "internal", 2: "invalid", 3: "unauthenticated", 4: "denied", 5: "not-found", 6: "exists", 7: "conflict", 8: "needs-approval",
		9: "expired", 10: "replayed", 11: "bad-signature", 12: "open-failed", 13: "unavailable", 14: "stale", 15: "not-resident",
		16: "unknown-outcome", 17: "too-large", 18: "read-only",
	}
	if Kind(len(names)-1) != ReadOnly {
		t.Errorf("the last kind is %d", ReadOnly)
	}
	for n, name := range names {
		if n > 0 && (Kind(n).String() != name || Kind(n).Error() != name) {
			t.Errorf("kind %d is called %q, want %q", n, Kind(n), name)
		}
	}
	for _, k := range []Kind{0, 19, 255} {
		if k.String() != fmt.Sprintf("kind-%d", uint8(k)) {
			t.Errorf("unknown kind %d is called %q", uint8(k), k)
		}
	}
}

func TestErrors(t *testing.T) {
	err := Errorf(NotFound, "key %s does not exist", "a/b")
	if err.Error() != "key a/b does not exist" || !errors.Is(err, NotFound) || errors.Is(err, Invalid) || KindOf(err) != NotFound {
		t.Errorf("%v", err)
	}
	wrapped := Wrap(Unavailable, io.ErrUnexpectedEOF, "the device is gone", "plug it in")
	if wrapped.Error() != "the device is gone; plug it in" || !errors.Is(wrapped, io.ErrUnexpectedEOF) || !errors.Is(wrapped, Unavailable) {
		t.Errorf("%v", wrapped)
	}
	if strings.Contains(wrapped.Error(), "EOF") {
		t.Error("the cause is shown")
	}
	if Wrap(Denied, nil, "no", "").Error() != "no" {
		t.Error("a message without a next step")
	}
	// The outermost kind is the one that counts; the inner one can be found.
	both := Wrap(Unavailable, err, "outer", "")
	if KindOf(both) != Unavailable || !errors.Is(both, NotFound) || KindOf(fmt.Errorf("context: %w", both)) != Unavailable {
		t.Error("the outermost kind does not count")
	}
}

func TestKindOf(t *testing.T) {
	for _, v := range []struct {
		err  error
		want Kind
	}{
		{nil, 0}, {io.EOF, Internal}, {Denied, Denied}, {fmt.Errorf("x: %w", Stale), Stale}, {ErrOpen, OpenFailed},
		{fmt.Errorf("x: %w", ErrOpen), OpenFailed}, {errors.Join(io.EOF, Errorf(Replayed, "seen")), Replayed},
	} {
		if got := KindOf(v.err); got != v.want {
			t.Errorf("%v is %v, want %v", v.err, got, v.want)
		}
	}
}

// TestErrOpenSaysNothing: it tells no cause and names no part.
func TestErrOpenSaysNothing(t *testing.T) {
	if errors.Unwrap(ErrOpen) != nil || !errors.Is(ErrOpen, OpenFailed) {
		t.Error("ErrOpen has a cause")
	}
	for _, word := range []string{"tag", "padding", "length", "commitment", "version", "truncated", "format"} {
		if strings.Contains(ErrOpen.Error(), word) {
			t.Errorf("ErrOpen speaks of the %s", word)
		}
	}
}
