package fakedevice

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"errors"
	"testing"
	"time"
)

func TestFaults(t *testing.T) {
	ctx := context.Background()
	d, err := New(nil)
	if err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken")
	d.Fail(func(op string) error {
		if op == OpSign {
			return broken
		}
		return nil
	})
	if _, err := d.Sign(ctx, make([]byte, 48)); !errors.Is(err, broken) {
		t.Fatalf("Sign: %v", err)
	}
	if err := d.Check(ctx); err != nil {
		t.Fatal(err)
	}
	d.Fail(nil)
	if _, err := d.Sign(ctx, make([]byte, 48)); err != nil {
		t.Fatal(err)
	}
	if n := d.Calls(OpSign); n != 2 {
		t.Fatalf("%d calls of Sign, want 2", n)
	}

	d.Hang(func(op string) bool { return op == OpCheck })
	short, cancel := context.WithTimeout(ctx, time.Millisecond)
	defer cancel()
	if err := d.Check(short); !errors.Is(err, ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("Check of a hanging device: %v", err)
	}
	d.Hang(nil)
	d.Delay(func(string) time.Duration { return time.Hour })
	if err := d.Check(short); !errors.Is(err, ErrUnavailable) {
		t.Fatalf("Check of a slow device: %v", err)
	}
	d.Delay(nil)

	d.Corrupt(func(op string, out []byte) { out[len(out)-1] ^= 1 })
	blob, err := d.Wrap(ctx, nil, []byte("key"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.Unwrap(ctx, nil, blob); !errors.Is(err, ErrInvalid) {
		t.Fatalf("a corrupted blob opened: %v", err)
	}
}

func TestReopenKeepsKeys(t *testing.T) {
	d, err := New(ecdh.P256())
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(d.Reopen().AgreementKey().Bytes(), d.AgreementKey().Bytes()) {
		t.Fatal("another key after Reopen")
	}
	if err := d.Reopen().Check(context.Background()); err != nil {
		t.Fatal(err)
	}
}
