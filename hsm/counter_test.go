package hsm

import (
	"errors"
	"testing"

	"github.com/miekg/pkcs11"
)

// counts holds the counter of a device to a value.
func stands(t *testing.T, c *Counter, want uint64) {
	t.Helper()
	if got, err := c.Count(t.Context()); err != nil || got != want {
		t.Fatalf("the counter is at %d, want %d (%v)", got, want, err)
	}
}

// The counter lies in the token: it goes on when the device is opened again, after an increment
// that was cut short as well.
func TestCounter(t *testing.T) {
	tok, d := openNew(t)
	c := d.Counter("a")
	stands(t, c, 0)
	for range 2 { // the second finds it
		if has, err := c.Exists(t.Context()); err != nil || !has {
			t.Fatalf("SoftHSM has a counter: %v, %v", has, err)
		}
	}
	for want := uint64(1); want <= 3; want++ {
		if got, err := c.Increment(t.Context()); err != nil || got != want {
			t.Fatalf("%d, %v; want %d", got, err, want)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = tok.open(t)
	c = d.Counter("a")
	stands(t, c, 3)

	object := func(value []byte) {
		t.Helper()
		if _, err := call(t.Context(), d, callOptions{op: "plant", rw: true}, func(s *session) (pkcs11.ObjectHandle, error) {
			return s.p11.CreateObject(s.h, c.object(value))
		}); err != nil {
			t.Fatal(err)
		}
	}
	object([]byte{0, 0, 0, 0, 0, 0, 0, 4}) // cut short before the old one was removed
	stands(t, c, 4)
	if got, err := c.Increment(t.Context()); err != nil || got != 5 {
		t.Fatal(got, err)
	}
	left, err := call(t.Context(), d, callOptions{op: "look"}, c.read)
	if err != nil || len(left.objects) != 1 || left.value != 5 {
		t.Fatalf("%+v, %v", left, err)
	}
	stands(t, d.Counter("b"), 0) // another cluster's, on the same token

	// What anybody who reaches the token can make is not the counter.
	public := c.object([]byte{255, 255, 255, 255, 255, 255, 255, 255})
	for i, a := range public {
		if a.Type == pkcs11.CKA_PRIVATE {
			public[i] = pkcs11.NewAttribute(pkcs11.CKA_PRIVATE, false)
		}
	}
	if _, err := call(t.Context(), d, callOptions{op: "plant", rw: true}, func(s *session) (pkcs11.ObjectHandle, error) {
		return s.p11.CreateObject(s.h, public)
	}); err != nil {
		t.Fatal(err)
	}
	stands(t, c, 5)
	object([]byte{1})
	if _, err := c.Count(t.Context()); !errors.Is(err, ErrUnsafeToken) {
		t.Errorf("an object that is no number: %v", err)
	}
	if _, err := c.Increment(t.Context()); !errors.Is(err, ErrUnsafeToken) {
		t.Errorf("an object that is no number: %v", err)
	}
}
