package keyring

import (
	"crypto/hmac"
	"crypto/sha256"
	"runtime"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
)

// Material is an opened key version. It is safe for concurrent use until it is
// destroyed; a Material from a Cache is destroyed by the Cache.
type Material struct {
	binding KeyBinding
	bytes   *secret.Bytes
	source  hmacSource
	signer  *signer // of sign keys
	public  []byte  // of sign keys
}

// NewMaterial takes an unwrapped key version into use. It owns bytes from then
// on, also when it fails: kms.Invalid for what is not material of the binding's
// algorithm.
func NewMaterial(b KeyBinding, bytes *secret.Bytes) (*Material, error) {
	m, err := newMaterial(b, bytes)
	if err != nil {
		bytes.Destroy()
		return nil, err
	}
	return m, nil
}

func newMaterial(b KeyBinding, bytes *secret.Bytes) (*Material, error) {
	if err := b.validate(); err != nil {
		return nil, err
	}
	if want := materialSize(b.Algorithm); bytes.Len() != want {
		return nil, kms.Errorf(kms.Invalid, "material of %s has %d bytes, not %d", b.Algorithm, want, bytes.Len())
	}
	m := &Material{binding: b, bytes: bytes, source: memoryHMAC{bytes}}
	var err error
	if m.signer, err = parseSigner(b.Algorithm, bytes); err != nil || m.signer == nil {
		return m, err
	}
	m.public, err = m.signer.public()
	return m, err
}

// Binding says which key version this is.
func (m *Material) Binding() KeyBinding { return m.binding }

// PublicKey returns the public key of a sign key in the form of Generate, nil
// for other keys.
func (m *Material) PublicKey() []byte { return slices.Clone(m.public) }

func (m *Material) need(p kms.Purpose) error {
	if m.binding.Purpose != p {
		return kms.Errorf(kms.Invalid, "the key is for %q, not for %q", string(m.binding.Purpose), string(p))
	}
	return nil
}

// Encrypt returns a ciphertext of format 1 of at most MaxPlaintext bytes,
// bound to the encryption context. It is Overhead bytes longer than plaintext.
// Errors: kms.Invalid, kms.TooLarge.
func (m *Material) Encrypt(context Context, plaintext []byte) ([]byte, error) {
	if err := m.need(kms.Encrypt); err != nil {
		return nil, err
	}
	b, err := seal(m.source, m.binding.KeyID, m.binding.Version, context, plaintext)
	runtime.KeepAlive(m)
	return b, err
}

// Decrypt opens a ciphertext that this key version made under the same
// context. Whatever is wrong with it, the error is kms.ErrOpen.
func (m *Material) Decrypt(context Context, ciphertext []byte) ([]byte, error) {
	if m.binding.Purpose != kms.Encrypt {
		return nil, kms.ErrOpen
	}
	b, err := open(m.source, m.binding.KeyID, m.binding.Version, context, ciphertext)
	runtime.KeepAlive(m)
	return b, err
}

// MAC returns the 32-byte HMAC-SHA-256 (FIPS 198-1) of message. kms.Invalid for
// a key of another purpose.
func (m *Material) MAC(message []byte) ([]byte, error) {
	if err := m.need(kms.MAC); err != nil {
		return nil, err
	}
	b, err := m.source.HMAC(make([]byte, 0, sha256.Size), message)
	runtime.KeepAlive(m)
	return b, err
}

// VerifyMAC compares in constant time; a truncated MAC does not verify. The
// error is kms.ErrOpen.
func (m *Material) VerifyMAC(message, mac []byte) error {
	if m.binding.Purpose != kms.MAC {
		return kms.ErrOpen
	}
	want, err := m.MAC(message)
	if err != nil {
		return err
	}
	if !hmac.Equal(want, mac) {
		return kms.ErrOpen
	}
	return nil
}

// Sign signs message as Verify describes. kms.Invalid for a key of another
// purpose.
func (m *Material) Sign(message []byte) ([]byte, error) {
	if err := m.need(kms.Sign); err != nil {
		return nil, err
	}
	if m.bytes.Len() == 0 {
		return nil, errDestroyed
	}
	return m.signer.sign(m.binding.Algorithm, message)
}

// Export returns a copy of the material, which the caller destroys. Whether a
// caller may have it is decided elsewhere. kms.Unavailable when no memory can
// be locked.
func (m *Material) Export() (*secret.Bytes, error) {
	if m.bytes.Len() == 0 {
		return nil, errDestroyed
	}
	s, err := secret.Copy(m.bytes.Reveal())
	runtime.KeepAlive(m)
	if err != nil {
		return nil, noMemory(err)
	}
	return s, nil
}

// CheckValue returns CheckValue of the material for node.
func (m *Material) CheckValue(node string) []byte {
	b := m.binding
	kcv := CheckValue(m.bytes, b.Cluster, b.Keyring, b.KeyID, b.Version, node)
	runtime.KeepAlive(m)
	return kcv
}

// Destroy zeroises the material. Nobody may be using it.
func (m *Material) Destroy() {
	m.bytes.Destroy()
	if m.signer != nil {
		m.signer.wipe()
	}
}
