package hsm

import (
	"errors"
	"testing"

	"github.com/miekg/pkcs11"
)

// counts holds the counter of a device to a value.
func counts(t *testing.T, d *Device, want uint64) {
	t.Helper()
	if got, err := d.Count(t.Context()); err != nil || got != want {
		t.Fatalf("the counter is at %d, want %d (%v)", got, want, err)
	}
}

// The counter lies in the token: it goes on when the device is opened again, after an increment
// that was cut short as well.
func TestCounter(t *testing.T) {
	tok, d := openNew(t)
	counts(t, d, 0)
	for range 2 { // the second finds it
		if has, err := d.HasCounter(t.Context()); err != nil || !has {
			t.Fatalf("SoftHSM has a counter: %v, %v", has, err)
		}
	}
	for want := uint64(1); want <= 3; want++ {
		if got, err := d.Increment(t.Context()); err != nil || got != want {
			t.Fatalf("%d, %v; want %d", got, err, want)
		}
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	d = tok.open(t)
	counts(t, d, 3)

	object := func(value []byte) {
		t.Helper()
		if _, err := call(t.Context(), d, callOptions{op: "plant", rw: true, bare: true}, func(s *session) (pkcs11.ObjectHandle, error) {
			return s.p11.CreateObject(s.h, d.counterObject(value))
		}); err != nil {
			t.Fatal(err)
		}
	}
	object([]byte{0, 0, 0, 0, 0, 0, 0, 4}) // cut short before the old one was removed
	counts(t, d, 4)
	if got, err := d.Increment(t.Context()); err != nil || got != 5 {
		t.Fatal(got, err)
	}
	left, err := call(t.Context(), d, callOptions{op: "look", bare: true}, func(s *session) (counters, error) { return s.counters(d) })
	if err != nil || len(left.objects) != 1 || left.value != 5 {
		t.Fatalf("%+v, %v", left, err)
	}
	object([]byte{1})
	if _, err := d.Count(t.Context()); !errors.Is(err, ErrUnsafeToken) {
		t.Errorf("an object that is no number: %v", err)
	}
	if _, err := d.Increment(t.Context()); !errors.Is(err, ErrUnsafeToken) {
		t.Errorf("an object that is no number: %v", err)
	}
}
