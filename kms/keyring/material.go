package keyring

import (
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"runtime"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
)

// MaxDeviceMAC is the longest message in bytes whose MAC a device computes.
const MaxDeviceMAC = 64 << 10

// Material is an opened key version: of protection software in locked memory, of
// protection hardware loaded into the device of this node. It is safe for
// concurrent use until it is destroyed; a Material from a Cache is destroyed by
// the Cache.
//
// Methods that take a context may ask the device: kms.Unavailable with the
// cause wrapped when it fails, or when the context ends first.
type Material struct {
	binding    KeyBinding
	protection kms.Protection
	source     hmacSource
	bytes      *secret.Bytes // nil for a key in the device
	signer     *signer       // of sign keys in memory
	device     *deviceSigner // of sign keys in the device
	unload     func()        // of keys in the device
	public     []byte        // of sign keys in memory
}

// NewMaterial takes an unwrapped key version of protection software into use. It
// owns bytes from then on, also when it fails: kms.Invalid for what is not
// material of the binding's algorithm.
func NewMaterial(b KeyBinding, bytes *secret.Bytes) (*Material, error) {
	return takeMaterial(b, kms.Software, bytes)
}

func takeMaterial(b KeyBinding, p kms.Protection, bytes *secret.Bytes) (*Material, error) {
	m, err := newMaterial(b, p, bytes)
	if err != nil {
		bytes.Destroy()
		return nil, err
	}
	return m, nil
}

func newMaterial(b KeyBinding, p kms.Protection, bytes *secret.Bytes) (*Material, error) {
	if err := b.validate(p); err != nil {
		return nil, err
	}
	if want := materialSize(b.Algorithm); bytes.Len() != want {
		return nil, kms.Errorf(kms.Invalid, "material of %s has %d bytes, not %d", b.Algorithm, want, bytes.Len())
	}
	m := &Material{binding: b, protection: p, bytes: bytes, source: memoryHMAC{bytes}}
	if b.Purpose != kms.Sign {
		return m, nil
	}
	cleanStack()
	defer cleanStack()
	var err error
	if m.signer, err = parseSigner(b.Algorithm, bytes); err != nil || m.signer == nil {
		return m, err
	}
	m.public, err = m.signer.public()
	return m, err
}

// Binding says which key version this is.
func (m *Material) Binding() KeyBinding { return m.binding }

// Protection says where the material is.
func (m *Material) Protection() kms.Protection { return m.protection }

// PublicKey returns the public key of a sign key in the form of Generate, nil
// for other keys and for those in a device, which show theirs by SignReceipt.
func (m *Material) PublicKey() []byte { return slices.Clone(m.public) }

func (m *Material) need(p kms.Purpose) error {
	if m.binding.Purpose != p {
		return kms.Errorf(kms.Invalid, "the key is for %q, not for %q", string(m.binding.Purpose), string(p))
	}
	return nil
}

// Encrypt returns a ciphertext of format 1 of at most MaxPlaintext bytes,
// bound to the encryption context c. It is Overhead bytes longer than plaintext.
// A device is asked for one HMAC of 82 bytes, whatever the plaintext. Errors:
// kms.Invalid, kms.TooLarge, kms.Unavailable.
func (m *Material) Encrypt(ctx context.Context, c Context, plaintext []byte) ([]byte, error) {
	if err := m.need(kms.Encrypt); err != nil {
		return nil, err
	}
	b, err := seal(ctx, m.source, m.binding.KeyID, m.binding.Version, c, plaintext)
	runtime.KeepAlive(m)
	return b, err
}

// Decrypt opens a ciphertext that this key version made under the same
// encryption context. Whatever is wrong with it, the error is kms.ErrOpen.
func (m *Material) Decrypt(ctx context.Context, c Context, ciphertext []byte) ([]byte, error) {
	if m.binding.Purpose != kms.Encrypt {
		return nil, kms.ErrOpen
	}
	b, err := open(ctx, m.source, m.binding.KeyID, m.binding.Version, c, ciphertext)
	runtime.KeepAlive(m)
	return b, err
}

// MAC returns the 32-byte HMAC-SHA-256 (FIPS 198-1) of message. kms.Invalid for
// a key of another purpose. With protection hardware also kms.TooLarge for more
// than MaxDeviceMAC bytes, and kms.Invalid for a message that begins as the
// inputs of key derivation do: 00000001, then "conclave/".
func (m *Material) MAC(ctx context.Context, message []byte) ([]byte, error) {
	if err := m.need(kms.MAC); err != nil {
		return nil, err
	}
	if m.protection == kms.Hardware {
		if len(message) > MaxDeviceMAC {
			return nil, kms.Errorf(kms.TooLarge, "the message has %d bytes; a device computes MACs of at most %d", len(message), MaxDeviceMAC)
		}
		if reserved(message) {
			return nil, &kms.Error{Kind: kms.Invalid, Msg: `messages that begin with the bytes 00 00 00 01 and "conclave/" are reserved: the key's check values are MACs of such`,
				Fix: "put something of your own before the message"}
		}
	}
	b, err := m.source.HMAC(ctx, make([]byte, 0, sha256.Size), message)
	runtime.KeepAlive(m)
	return b, err
}

// VerifyMAC compares in constant time; a truncated MAC does not verify. The
// error is kms.ErrOpen, or one of MAC.
func (m *Material) VerifyMAC(ctx context.Context, message, mac []byte) error {
	if m.binding.Purpose != kms.MAC {
		return kms.ErrOpen
	}
	want, err := m.MAC(ctx, message)
	if err != nil {
		return err
	}
	if !hmac.Equal(want, mac) {
		return kms.ErrOpen
	}
	return nil
}

// Sign signs message as Verify describes. kms.Invalid for a key of another
// purpose, and for a message that only receipts are signed over
// (kms.ReservedMessage) where the protection is hardware.
func (m *Material) Sign(ctx context.Context, message []byte) ([]byte, error) {
	if err := m.need(kms.Sign); err != nil {
		return nil, err
	}
	if m.protection == kms.Hardware && kms.ReservedMessage(message) {
		return nil, &kms.Error{Kind: kms.Invalid, Msg: "messages that begin as a receipt of this service are never signed on request",
			Fix: "put something of your own before the message"}
	}
	if m.device != nil {
		return m.device.sign(ctx, m.binding.Algorithm, message)
	}
	if m.bytes.Len() == 0 {
		return nil, errDestroyed
	}
	return m.signer.sign(m.binding.Algorithm, message)
}

// Export returns a copy of the material, which the caller destroys. Whether a
// caller may have it is decided elsewhere. kms.Invalid with protection hardware,
// kms.Unavailable when no memory can be locked.
func (m *Material) Export() (*secret.Bytes, error) {
	if m.protection != kms.Software {
		return nil, ErrNoExport
	}
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

// ErrNoExport is the answer to every export of a key of protection hardware.
var ErrNoExport error = &kms.Error{Kind: kms.Invalid, Msg: "keys of protection hardware are usable in the devices of their nodes alone and cannot be exported",
	Fix: "have data keys wrapped instead, or keep keys that must leave in a keyring of protection software"}

// CheckValue returns the 32-byte check value of the key version for node: that
// of the function CheckValue, or with protection hardware HMAC-SHA-256 under the
// key version, in the device, of block 1 of the KDF with the label
// "conclave/check-value/2" and the same context. Sign keys of protection
// hardware have none (kms.Invalid): see SignReceipt.
func (m *Material) CheckValue(ctx context.Context, node string) ([]byte, error) {
	b := m.binding
	if m.protection != kms.Hardware {
		kcv := CheckValue(m.bytes, b.Cluster, b.Keyring, b.KeyID, b.Version, node)
		runtime.KeepAlive(m)
		if kcv == nil {
			return nil, errDestroyed
		}
		return kcv, nil
	}
	if b.Purpose == kms.Sign {
		return nil, kms.Errorf(kms.Invalid, "a sign key of protection hardware has no check value; it signs its receipts")
	}
	kcv, err := m.source.HMAC(ctx, make([]byte, 0, sha256.Size), deviceCheckInput(b, node))
	runtime.KeepAlive(m)
	return kcv, err
}

// SignReceipt returns the signature, raw r‖s, over kms.ReceiptMessage by a sign
// key of protection hardware that is loaded into the device. kms.Invalid for
// other keys.
func (m *Material) SignReceipt(ctx context.Context, node string) ([]byte, error) {
	if m.device == nil {
		return nil, kms.Errorf(kms.Invalid, "only sign keys in a device sign receipts")
	}
	b := m.binding
	return m.device.raw(ctx, b.Algorithm, kms.ReceiptMessage(b.Cluster, b.Keyring, b.KeyID, b.Version, node))
}

// Destroy zeroises the material, or takes it out of the device. Nobody may be
// using it. It waits for the device at most as long as a call to it may take.
func (m *Material) Destroy() {
	m.bytes.Destroy()
	if m.signer != nil {
		m.signer.wipe()
	}
	if m.unload != nil {
		m.unload()
	}
}
