package keyring

import (
	"crypto/hmac"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
	"hash"
	"runtime"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/secret"
)

// Labels of the derivations. Every one is used with one hash and one kind of
// key, and none is a prefix of another.
const (
	labelMessageSecret = "conclave/message-secret/1"
	labelMessageKeys   = "conclave/message-keys/1"
	labelCheckKey      = "conclave/check-value/key/1"
	labelCheckKEK      = "conclave/check-value/kek/1"
	labelGenerate      = "conclave/generate/1"
)

// deriveBlock writes to h the input of block i of the KDF in counter mode of
// SP 800-108 revision 1, section 4.1, with a 32-bit counter before the fixed
// data: counter ‖ label ‖ 0x00 ‖ context ‖ L, where L is the length of the whole
// output in bits, 32 bits big endian.
func deriveBlock(h hash.Hash, i uint32, label string, context []byte, bits uint32) {
	var n [4]byte
	binary.BigEndian.PutUint32(n[:], i)
	h.Write(n[:])
	h.Write([]byte(label))
	h.Write([]byte{0})
	h.Write(context)
	binary.BigEndian.PutUint32(n[:], bits)
	h.Write(n[:])
}

// derive fills out from key with the KDF of deriveBlock and HMAC over newHash.
func derive(newHash func() hash.Hash, key []byte, label string, context, out []byte) {
	h := hmac.New(newHash, key)
	var sum [sha512.Size]byte
	defer secret.Wipe(sum[:])
	bits := uint32(len(out)) * 8
	for i := uint32(1); len(out) > 0; i++ {
		h.Reset()
		deriveBlock(h, i, label, context, bits)
		out = out[copy(out, h.Sum(sum[:0])):]
	}
}

// messageSecretInput returns the exact input of the one HMAC-SHA-256 under the
// key version that a message needs: block 1 of the KDF with the header, nonce
// included, as context and 256 bits of output. Wherever the key version lives,
// this is all that it is asked.
func messageSecretInput(header []byte) []byte {
	b := make([]byte, 0, 4+len(labelMessageSecret)+1+len(header)+4)
	b = binary.BigEndian.AppendUint32(b, 1)
	b = append(b, labelMessageSecret...)
	b = append(b, 0)
	b = append(b, header...)
	return binary.BigEndian.AppendUint32(b, 8*sha256.Size)
}

// messageKeys are what one message is protected with.
type messageKeys struct {
	key        [32]byte // AES-256-GCM
	commitment [32]byte // stands in the ciphertext
}

func (k *messageKeys) wipe() { secret.Wipe(k.key[:]) }

// derive computes both from the message secret (two blocks, 512 bits). The
// context is the AAD, so that the commitment covers the encryption context too.
func (k *messageKeys) derive(messageSecret, aad []byte) {
	var out [64]byte
	derive(sha256.New, messageSecret, labelMessageKeys, aad, out[:])
	copy(k.key[:], out[:32])
	copy(k.commitment[:], out[32:])
	secret.Wipe(out[:])
}

// hmacSource computes HMAC-SHA-256 under a key version, wherever that lives:
// appended to dst. An error means that the key could not be reached.
type hmacSource interface {
	HMAC(dst, input []byte) ([]byte, error)
}

// memoryHMAC is the source of a key version in locked memory.
type memoryHMAC struct{ key *secret.Bytes }

func (m memoryHMAC) HMAC(dst, input []byte) ([]byte, error) {
	h := hmac.New(sha256.New, m.key.Reveal())
	runtime.KeepAlive(m.key)
	h.Write(input)
	return h.Sum(dst), nil
}

// checkContext is what a check value is bound to.
type checkContext struct {
	Cluster string `cbor:"cluster"`
	Keyring string `cbor:"keyring"`
	KeyID   []byte `cbor:"key-id"`
	Version uint32 `cbor:"version"`
	Node    string `cbor:"node"`
}

// CheckValue returns the 32-byte key check value of a key version's material,
// bound to the node that shows it: who has it has opened the version. It is the
// KDF with HMAC-SHA-512, so that a MAC key used through MAC (HMAC-SHA-256)
// cannot be made to compute one.
func CheckValue(material *secret.Bytes, cluster, keyring string, id kms.KeyID, version uint32, node string) []byte {
	return checkValue(material, labelCheckKey, checkContext{cluster, keyring, id[:], version, node})
}

// KEKCheckValue returns the 32-byte key check value of a KEK version, bound to
// the node that shows it.
func KEKCheckValue(kek *secret.Bytes, cluster, keyring string, version uint32, node string) []byte {
	return checkValue(kek, labelCheckKEK, checkContext{cluster, keyring, nil, version, node})
}

func checkValue(key *secret.Bytes, label string, c checkContext) []byte {
	out := make([]byte, 32)
	derive(sha512.New, key.Reveal(), label, canon.Marshal(c), out)
	runtime.KeepAlive(key)
	return out
}

// CheckHash returns the 32-byte SHA-256 that commits to a check value before it
// is shown.
func CheckHash(kcv []byte) []byte {
	h := sha256.Sum256(kcv)
	return h[:]
}
