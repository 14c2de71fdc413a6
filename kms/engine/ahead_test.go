package engine

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
)

// A ciphertext of a version that a node does not know may come from a node that is
// ahead of it: a node that cannot catch up does not call it damaged.
func TestVersionThatIsNotHereYet(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("ring", "fr")
	w.key("ring", "key", kms.Encrypt)
	fr, service := w.at("fr"), caller("service", "fr")
	r := check[wire.EncryptResponse](t)(fr.engine.Encrypt(bg, service, "ring", "key", wire.EncryptRequest{Plaintext: []byte("x")}))
	newer := bytes.Clone(r.Ciphertext)
	newer[24] = 2 // the version
	fr.cutOff = true
	_, err := fr.engine.Decrypt(bg, service, "ring", "key", wire.DecryptRequest{Ciphertext: newer})
	if !errors.Is(err, kms.Unavailable) || !strings.Contains(err.Error(), "version 2 of key ring/key") {
		t.Errorf("cut off: %v", err)
	}
	if _, err := fr.engine.Decrypt(bg, service, "ring", "key", wire.DecryptRequest{Ciphertext: r.Ciphertext}); err != nil {
		t.Errorf("what it knows: %v", err)
	}
	fr.cutOff = false
	if _, err := fr.engine.Decrypt(bg, service, "ring", "key", wire.DecryptRequest{Ciphertext: newer}); err != kms.ErrOpen {
		t.Errorf("up to date: %v", err)
	}
}
