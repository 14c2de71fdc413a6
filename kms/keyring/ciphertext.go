package keyring

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"crypto/subtle"
	"encoding/binary"
	"slices"
	"unicode/utf8"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
)

// Sizes of ciphertext format 1 in bytes.
const (
	nonceSize      = 24
	headerSize     = 2 + 1 + 2 + 16 + 4 + nonceSize
	commitmentSize = 32
	tagSize        = 16

	// Overhead is how much longer a ciphertext is than its plaintext.
	Overhead = headerSize + commitmentSize + tagSize

	// MaxPlaintext is the longest plaintext that is encrypted.
	MaxPlaintext = 1 << 20

	// MaxContextPairs and MaxContext bound an encryption context: its pairs and
	// its encoded length in bytes.
	MaxContextPairs = 64
	MaxContext      = 8 << 10
)

const (
	magic   = "CV"
	format1 = 1
)

// Context is an encryption context: public name-value pairs that must be the
// same for decryption as they were for encryption. A nil Context and an empty
// one are the same.
type Context map[string]string

// Header is what a ciphertext says of itself. None of it is authenticated
// before the ciphertext is decrypted.
type Header struct {
	Suite   pqc.SuiteID
	KeyID   kms.KeyID
	Version uint32 // of the key, from 1
}

// ParseHeader reads the header of a ciphertext of format 1 and checks that the
// rest is long enough. The error is kms.ErrOpen.
func ParseHeader(b []byte) (Header, error) {
	if len(b) < Overhead || len(b) > Overhead+MaxPlaintext || string(b[:2]) != magic || b[2] != format1 {
		return Header{}, kms.ErrOpen
	}
	h := Header{
		Suite:   pqc.SuiteID(binary.BigEndian.Uint16(b[3:5])),
		KeyID:   kms.KeyID(b[5:21]),
		Version: binary.BigEndian.Uint32(b[21:25]),
	}
	if h.Suite != pqc.CiphertextFormat1 || h.Version == 0 {
		return Header{}, kms.ErrOpen
	}
	return h, nil
}

// appendHeader appends the header without the nonce: 25 bytes.
func appendHeader(b []byte, id kms.KeyID, version uint32) []byte {
	b = append(b, magic...)
	b = append(b, format1)
	b = binary.BigEndian.AppendUint16(b, uint16(pqc.CiphertextFormat1))
	b = append(b, id[:]...)
	return binary.BigEndian.AppendUint32(b, version)
}

// EncodeContext returns the one encoding of an encryption context: the number
// of pairs, then for every pair in bytewise order of the names the length of
// the name, the name, the length of the value, the value; all numbers 16 bits
// big endian. It refuses more than MaxContextPairs pairs and more than
// MaxContext bytes (kms.TooLarge), empty names and what is not UTF-8
// (kms.Invalid).
func EncodeContext(c Context) ([]byte, error) { return appendContext(nil, c) }

// appendContext appends the encoding of c to a copy of prefix.
func appendContext(prefix []byte, c Context) ([]byte, error) {
	size, err := contextSize(c)
	if err != nil {
		return nil, err
	}
	b := append(make([]byte, 0, len(prefix)+size), prefix...)
	b = binary.BigEndian.AppendUint16(b, uint16(len(c)))
	if len(c) == 0 {
		return b, nil
	}
	var room [MaxContextPairs]string
	names := room[:0]
	for name := range c {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		b = appendString(appendString(b, name), c[name])
	}
	return b, nil
}

// contextSize returns the length of the encoding of c after checking that c has
// one.
func contextSize(c Context) (int, error) {
	if len(c) > MaxContextPairs {
		return 0, kms.Errorf(kms.TooLarge, "encryption context has %d pairs, at most %d are allowed", len(c), MaxContextPairs)
	}
	size := 2
	for name, value := range c {
		if name == "" {
			return 0, kms.Errorf(kms.Invalid, "encryption context has a pair without a name")
		}
		if !utf8.ValidString(name) || !utf8.ValidString(value) {
			return 0, kms.Errorf(kms.Invalid, "encryption context is not UTF-8")
		}
		size += 4 + len(name) + len(value)
	}
	if size > MaxContext {
		return 0, kms.Errorf(kms.TooLarge, "encryption context encodes to %d bytes, at most %d are allowed", size, MaxContext)
	}
	return size, nil
}

func appendString(b []byte, s string) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(len(s)))
	return append(b, s...)
}

// zeroNonce is the nonce of GCM: every message has its own key, which seals
// this one message and nothing else.
var zeroNonce [12]byte

// seal makes a ciphertext of format 1 under the key version behind src.
func seal(ctx context.Context, src hmacSource, id kms.KeyID, version uint32, pairs Context, plaintext []byte) ([]byte, error) {
	var nonce [nonceSize]byte
	rand.Read(nonce[:]) // never fails: crypto/rand stops the process instead
	return sealNonce(ctx, src, id, version, &nonce, pairs, plaintext)
}

// sealNonce is seal with a nonce, which no caller but seal and the tests chooses.
func sealNonce(ctx context.Context, src hmacSource, id kms.KeyID, version uint32, nonce *[nonceSize]byte, pairs Context, plaintext []byte) ([]byte, error) {
	if len(plaintext) > MaxPlaintext {
		return nil, kms.Errorf(kms.TooLarge, "plaintext has %d bytes, at most %d are allowed", len(plaintext), MaxPlaintext)
	}
	out := make([]byte, headerSize+commitmentSize, Overhead+len(plaintext))
	header := append(appendHeader(out[:0], id, version), nonce[:]...)
	aad, err := appendContext(header, pairs)
	if err != nil {
		return nil, err
	}
	var keys messageKeys
	defer keys.wipe()
	if err := keys.fromSource(ctx, src, header, aad); err != nil {
		return nil, err
	}
	copy(out[headerSize:], keys.commitment())
	aead, err := newGCM(keys.key())
	if err != nil {
		return nil, err
	}
	return aead.Seal(out, zeroNonce[:], plaintext, aad), nil
}

// open opens a ciphertext of format 1. It returns kms.ErrOpen for whatever is
// wrong with it, and src's own error when the key could not be reached.
func open(ctx context.Context, src hmacSource, id kms.KeyID, version uint32, pairs Context, ciphertext []byte) ([]byte, error) {
	h, err := ParseHeader(ciphertext)
	if err != nil || h.KeyID != id || h.Version != version {
		return nil, kms.ErrOpen
	}
	header := ciphertext[:headerSize]
	aad, err := appendContext(header, pairs)
	if err != nil {
		return nil, kms.ErrOpen
	}
	var keys messageKeys
	defer keys.wipe()
	if err := keys.fromSource(ctx, src, header, aad); err != nil {
		return nil, err
	}
	commitment := ciphertext[headerSize : headerSize+commitmentSize]
	if subtle.ConstantTimeCompare(commitment, keys.commitment()) != 1 {
		return nil, kms.ErrOpen
	}
	aead, err := newGCM(keys.key())
	if err != nil {
		return nil, err
	}
	sealed := ciphertext[headerSize+commitmentSize:]
	plaintext, err := aead.Open(make([]byte, 0, len(sealed)-tagSize), zeroNonce[:], sealed, aad)
	if err != nil {
		return nil, kms.ErrOpen
	}
	return plaintext, nil
}

// fromSource asks src for the message secret and derives the keys from it.
func (k *messageKeys) fromSource(ctx context.Context, src hmacSource, header, aad []byte) error {
	var room [32]byte
	ms, err := src.HMAC(ctx, room[:0], messageSecretInput(header))
	if err != nil {
		return err
	}
	defer secret.Wipe(ms)
	if len(ms) != len(room) {
		return kms.Errorf(kms.Internal, "an HMAC-SHA-256 has %d bytes", len(ms))
	}
	k.derive(ms, aad)
	return nil
}

// newGCM returns AES-256-GCM with a 12-byte nonce and a 16-byte tag.
func newGCM(key []byte) (cipher.AEAD, error) {
	block, err := aes.NewCipher(key)
	if err != nil {
		return nil, kms.Wrap(kms.Internal, err, "AES key of the wrong length", "")
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		return nil, kms.Wrap(kms.Internal, err, "AES-GCM is not to be had", "")
	}
	return aead, nil
}
