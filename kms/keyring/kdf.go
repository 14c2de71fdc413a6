package keyring

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/sha256"
	"crypto/sha512"
	"encoding/binary"
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
	labelCheckValue    = "conclave/check-value/1"
	labelDeviceCheck   = "conclave/check-value/2"
	labelGenerate      = "conclave/generate/1"
)

// kdfInput returns the input of block 1 of the KDF in counter mode of SP
// 800-108 revision 1, section 4.1, with a 32-bit counter before the fixed data:
// counter ‖ label ‖ 0x00 ‖ context ‖ L, where L is the length of the whole
// output in bits. Numbers are big endian; the counter is the first four bytes.
func kdfInput(label string, context []byte, bits uint32) []byte {
	b := make([]byte, 0, 4+len(label)+1+len(context)+4)
	b = binary.BigEndian.AppendUint32(b, 1)
	b = append(b, label...)
	b = append(b, 0)
	b = append(b, context...)
	return binary.BigEndian.AppendUint32(b, bits)
}

// derive512 fills out from key with the KDF of kdfInput and HMAC-SHA-512.
func derive512(key []byte, label string, context, out []byte) {
	input := kdfInput(label, context, uint32(len(out))*8)
	var sum [sha512.Size]byte
	defer secret.Wipe(sum[:])
	for i := uint32(1); len(out) > 0; i++ {
		binary.BigEndian.PutUint32(input, i)
		h := hmac.New(sha512.New, key)
		h.Write(input)
		out = out[copy(out, h.Sum(sum[:0])):]
	}
}

// messageSecretInput returns the exact input of the one HMAC-SHA-256 under the
// key version that a message needs: the only block of the KDF with the header,
// nonce included, as context and 256 bits of output. Wherever the key version
// lives, this is all that it is asked.
func messageSecretInput(header []byte) []byte {
	return kdfInput(labelMessageSecret, header, 8*sha256.Size)
}

// messageKeys is what one message is protected with: the AES-256-GCM key and
// the commitment that stands in the ciphertext.
type messageKeys [64]byte

func (k *messageKeys) key() []byte        { return k[:32] }
func (k *messageKeys) commitment() []byte { return k[32:] }
func (k *messageKeys) wipe()              { secret.Wipe(k[:]) }

// derive computes both from the message secret (two blocks, 512 bits). The
// context is the AAD, so that the commitment covers the encryption context too.
func (k *messageKeys) derive(messageSecret, aad []byte) {
	input := kdfInput(labelMessageKeys, aad, 8*uint32(len(k)))
	for i := range uint32(2) {
		binary.BigEndian.PutUint32(input, i+1)
		block := hmacSHA256(messageSecret, input)
		copy(k[32*i:], block[:])
		secret.Wipe(block[:])
	}
}

// shortInput is the longest HMAC input that is put together on the stack.
const shortInput = 448

// hmacSHA256 returns HMAC-SHA-256 (FIPS 198-1) of input. For a key that fits a
// hash block and a short input it does what crypto/hmac does, but in memory
// that it wipes: crypto/hmac leaves the padded key to the garbage collector,
// and five allocations with every call.
func hmacSHA256(key, input []byte) (sum [sha256.Size]byte) {
	if len(key) > sha256.BlockSize || len(input) > shortInput {
		h := hmac.New(sha256.New, key)
		h.Write(input)
		copy(sum[:], h.Sum(nil))
		return sum
	}
	var buf [sha256.BlockSize + shortInput]byte
	defer secret.Wipe(buf[:sha256.BlockSize+sha256.Size])
	pad(buf[:sha256.BlockSize], key, 0x36)
	sum = sha256.Sum256(buf[:sha256.BlockSize+copy(buf[sha256.BlockSize:], input)])
	pad(buf[:sha256.BlockSize], key, 0x5c)
	return sha256.Sum256(buf[:sha256.BlockSize+copy(buf[sha256.BlockSize:], sum[:])])
}

// pad fills block with key, zeros after it, XOR b.
func pad(block, key []byte, b byte) {
	for i := copy(block, key); i < len(block); i++ {
		block[i] = 0
	}
	for i := range block {
		block[i] ^= b
	}
}

// hmacSource computes HMAC-SHA-256 under a key version, wherever that lives:
// appended to dst. An error means that the key could not be reached.
type hmacSource interface {
	HMAC(ctx context.Context, dst, input []byte) ([]byte, error)
}

// memoryHMAC is the source of a key version in locked memory.
type memoryHMAC struct{ key *secret.Bytes }

func (m memoryHMAC) HMAC(_ context.Context, dst, input []byte) ([]byte, error) {
	if m.key.Len() == 0 {
		return nil, errDestroyed // never under an empty key
	}
	sum := hmacSHA256(m.key.Reveal(), input)
	runtime.KeepAlive(m.key)
	defer secret.Wipe(sum[:])
	return append(dst, sum[:]...), nil
}

// errDestroyed reports the use of a key after its end: a bug of the caller.
var errDestroyed = kms.Errorf(kms.Internal, "the key was destroyed while in use")

// checkContext is what a check value is bound to.
type checkContext struct {
	Cluster string `cbor:"cluster"`
	Keyring string `cbor:"keyring"`
	KeyID   []byte `cbor:"key-id"`
	Version uint32 `cbor:"version"`
	Node    string `cbor:"node"`
}

func encodeCheck(cluster, keyring string, id kms.KeyID, version uint32, node string) []byte {
	return canon.Marshal(checkContext{cluster, keyring, id[:], version, node})
}

// deviceCheckInput returns the input of the one HMAC-SHA-256 that is the check
// value of a key version of protection hardware. A device does no HMAC-SHA-512
// for us, so what keeps callers of MAC from asking for a check value is that MAC
// refuses such messages: see reserved.
func deviceCheckInput(b KeyBinding, node string) []byte {
	return kdfInput(labelDeviceCheck, encodeCheck(b.Cluster, b.Keyring, b.KeyID, b.Version, node), 8*sha256.Size)
}

// reservedPrefix begins every input that the KDF gives to HMAC-SHA-256 under a
// key version: the counter, and what all labels begin with.
const reservedPrefix = "\x00\x00\x00\x01conclave/"

// reserved reports whether a message begins as the KDF's inputs do.
func reserved(message []byte) bool { return bytes.HasPrefix(message, []byte(reservedPrefix)) }

// CheckValue returns the 32-byte key check value of a key version's material,
// bound to the node that shows it: who has it has opened the version. The zero
// key id, which no key has, stands for the keyring's KEK of that version. It is
// the KDF with HMAC-SHA-512, so that a MAC key used through MAC (HMAC-SHA-256)
// cannot be made to compute one. A destroyed secret has none: nil.
func CheckValue(material *secret.Bytes, cluster, keyring string, id kms.KeyID, version uint32, node string) []byte {
	if material.Len() == 0 {
		return nil
	}
	out := make([]byte, 32)
	derive512(material.Reveal(), labelCheckValue, encodeCheck(cluster, keyring, id, version, node), out)
	runtime.KeepAlive(material)
	return out
}

// CheckHash returns the 32-byte SHA-256 that commits to a check value before it
// is shown.
func CheckHash(kcv []byte) []byte {
	h := sha256.Sum256(kcv)
	return h[:]
}
