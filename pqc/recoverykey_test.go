package pqc

import (
	"bytes"
	"errors"
	"testing"

	"github.com/conclave-kms/conclave/kms/secret"
)

func TestKEMKey(t *testing.T) {
	seed := make([]byte, HybridSeedSize)
	keys := make([]*SoftwareKey, 2)
	for i := range keys {
		seed[0] = byte(i)
		s, err := secret.Copy(seed)
		if err != nil {
			t.Fatal(err)
		}
		k, err := NewHybridKey(s)
		if err != nil {
			t.Fatal(err)
		}
		for range 2 { // the same each time
			if keys[i], err = k.KEMKey(); err != nil {
				t.Fatal(err)
			}
		}
		again, err := k.KEMKey()
		if err != nil || !again.PublicKey().Equal(keys[i].PublicKey()) {
			t.Fatalf("the KEM key of one signing key changes: %v", err)
		}
		k.Destroy()
		if _, err := k.KEMKey(); !errors.Is(err, ErrKey) {
			t.Errorf("after Destroy: %v", err)
		}
	}
	if keys[0].Suite() != CustodianKEM || keys[0].PublicKey().Equal(keys[1].PublicKey()) {
		t.Fatal("two signing keys have one KEM key, or it is of another suite")
	}
	pub, err := ParsePublicKey(CustodianKEM, keys[0].PublicKey().Bytes())
	if err != nil {
		t.Fatal(err)
	}
	sealed, err := pub.Seal([]byte("i"), []byte("a"), []byte("share"))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := keys[0].Open([]byte("i"), []byte("a"), sealed); err != nil || !bytes.Equal(got, []byte("share")) {
		t.Fatalf("it does not open what was sealed to it: %v", err)
	}
	if _, err := keys[1].Open([]byte("i"), []byte("a"), sealed); !errors.Is(err, ErrOpen) {
		t.Fatalf("another key: %v", err)
	}
}
