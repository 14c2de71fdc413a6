package keyring

import (
	"crypto/rand"
	"runtime"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/secret"
)

// KEKSize is the length of a KEK in bytes: an AES-256 key.
const KEKSize = 32

const (
	wrapFormat1 = 1
	wrapNonce   = 12
	wrapPrefix  = 1 + wrapNonce
	wrapDomain  = "conclave/wrapped-key/1"
)

// KeyBinding is everything that a wrapped key version is bound to. A sealed copy
// of one of protection hardware is bound to its node as well.
type KeyBinding struct {
	Cluster   string        // cluster id
	Keyring   string        // name
	KEK       uint32        // version of the keyring's KEK, from 1; 0 with protection hardware, which has none
	KeyID     kms.KeyID     //
	Version   uint32        // of the key, from 1
	Algorithm kms.Algorithm //
	Purpose   kms.Purpose   //
}

// aad returns the canonical encoding of the binding under a domain string.
func (b KeyBinding) aad() []byte {
	return canon.Marshal(struct {
		Domain    string        `cbor:"domain"`
		Cluster   string        `cbor:"cluster"`
		Keyring   string        `cbor:"keyring"`
		KEK       uint32        `cbor:"kek"`
		KeyID     []byte        `cbor:"key-id"`
		Version   uint32        `cbor:"version"`
		Algorithm kms.Algorithm `cbor:"algorithm"`
		Purpose   kms.Purpose   `cbor:"purpose"`
	}{wrapDomain, b.Cluster, b.Keyring, b.KEK, b.KeyID[:], b.Version, b.Algorithm, b.Purpose})
}

// validate refuses a binding with something left out, or one that cannot be of
// the protection level.
func (b KeyBinding) validate(p kms.Protection) error {
	if b.Cluster == "" || b.Keyring == "" || b.Version == 0 || b.KeyID == (kms.KeyID{}) {
		return kms.Errorf(kms.Invalid, "key binding is incomplete: cluster, keyring, key id and key version are all needed")
	}
	if (b.KEK == 0) != (p == kms.Hardware) {
		return kms.Errorf(kms.Invalid, "key binding: a KEK version is needed with protection %s, and only there", kms.Software)
	}
	if p == kms.Hardware && b.Algorithm == kms.Ed25519 {
		return errNoEd25519
	}
	return checkAlgorithm(b.Purpose, b.Algorithm)
}

var errNoEd25519 error = &kms.Error{Kind: kms.Invalid, Msg: "protection hardware does not offer ed25519: devices cannot import such keys",
	Fix: "use ecdsa-p256 or ecdsa-p384"}

// WrapMaterial encrypts the material of a key version under a KEK (32 bytes):
// format byte 1 ‖ random 96-bit nonce ‖ AES-256-GCM ciphertext and tag, the AAD
// being the canonical encoding of b. One KEK must not wrap more than 2^32 times
// (SP 800-38D, section 8.3). Both secrets stay the caller's. A binding, KEK or
// material of the wrong shape is kms.Invalid.
func WrapMaterial(kek *secret.Bytes, b KeyBinding, material *secret.Bytes) ([]byte, error) {
	if err := b.validate(kms.Software); err != nil {
		return nil, err
	}
	if kek.Len() != KEKSize {
		return nil, kms.Errorf(kms.Invalid, "a KEK has %d bytes, not %d", KEKSize, kek.Len())
	}
	if want := materialSize(b.Algorithm); material.Len() != want {
		return nil, kms.Errorf(kms.Invalid, "material of %s has %d bytes, not %d", b.Algorithm, want, material.Len())
	}
	aead, err := newGCM(kek.Reveal())
	runtime.KeepAlive(kek)
	if err != nil {
		return nil, err
	}
	out := make([]byte, wrapPrefix, wrapPrefix+material.Len()+tagSize)
	out[0] = wrapFormat1
	rand.Read(out[1:wrapPrefix])
	out = aead.Seal(out, out[1:wrapPrefix], material.Reveal(), b.aad())
	runtime.KeepAlive(material)
	return out, nil
}

// UnwrapMaterial decrypts what WrapMaterial made under the same KEK and binding
// into locked memory; the caller destroys it. The error is kms.ErrOpen, or
// kms.Unavailable when no memory can be locked.
func UnwrapMaterial(kek *secret.Bytes, b KeyBinding, wrapped []byte) (*secret.Bytes, error) {
	size := materialSize(b.Algorithm)
	if b.validate(kms.Software) != nil || kek.Len() != KEKSize || len(wrapped) != wrapPrefix+size+tagSize || wrapped[0] != wrapFormat1 {
		return nil, kms.ErrOpen
	}
	aead, err := newGCM(kek.Reveal())
	runtime.KeepAlive(kek)
	if err != nil {
		return nil, err
	}
	material, err := newSecret(size)
	if err != nil {
		return nil, err
	}
	if _, err := aead.Open(material.Reveal()[:0], wrapped[1:wrapPrefix], wrapped[wrapPrefix:], b.aad()); err != nil {
		material.Destroy()
		return nil, kms.ErrOpen
	}
	return material, nil
}

// newSecret is secret.New with an error that an operator can act on.
func newSecret(n int) (*secret.Bytes, error) {
	s, err := secret.New(n)
	if err != nil {
		return nil, noMemory(err)
	}
	return s, nil
}

func noMemory(err error) error {
	return kms.Wrap(kms.Unavailable, err, "no memory can be locked for key material", "raise the limit of locked memory of the node (LimitMEMLOCK)")
}
