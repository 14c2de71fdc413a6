package keyring

import (
	"bytes"
	"crypto/aes"
	"encoding/binary"
	"testing"

	"github.com/conclave-kms/conclave/kms"
)

// gf is an element of GF(2^128) as GCM writes it (SP 800-38D, section 6.3): bit
// 0 is the most significant bit of the first byte.
type gf struct{ hi, lo uint64 }

func gfFrom(b []byte) gf {
	return gf{binary.BigEndian.Uint64(b), binary.BigEndian.Uint64(b[8:])}
}

func (x gf) bytes() []byte {
	return binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, x.hi), x.lo)
}

func (x gf) add(y gf) gf { return gf{x.hi ^ y.hi, x.lo ^ y.lo} }

func (x gf) mul(y gf) gf {
	var z gf
	for i := range 128 {
		bit := x.hi >> (63 - i%64) & 1
		if i >= 64 {
			bit = x.lo >> (63 - i%64) & 1
		}
		if bit == 1 {
			z = z.add(y)
		}
		carry := y.lo & 1
		y = gf{y.hi >> 1, y.lo>>1 | y.hi<<63}
		if carry == 1 {
			y.hi ^= 0xe1 << 56
		}
	}
	return z
}

// inverse is x^(2^128 - 2).
func (x gf) inverse() gf {
	z := gf{1 << 63, 0} // one
	for range 127 {
		x = x.mul(x)
		z = z.mul(x)
	}
	return z
}

func ghash(h gf, aad, ct []byte) gf {
	var y gf
	for _, part := range [][]byte{aad, ct} {
		padded := append(bytes.Clone(part), make([]byte, (16-len(part)%16)%16)...)
		for len(padded) > 0 {
			y = y.add(gfFrom(padded)).mul(h)
			padded = padded[16:]
		}
	}
	return y.add(gf{uint64(len(aad)) * 8, uint64(len(ct)) * 8}).mul(h)
}

// gcmSecrets returns the hash key and the mask of the tag under the zero nonce.
func gcmSecrets(t *testing.T, key []byte) (h, mask gf) {
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	var b [16]byte
	block.Encrypt(b[:], b[:])
	h = gfFrom(b[:])
	b = [16]byte{15: 1}
	block.Encrypt(b[:], b[:])
	return h, gfFrom(b[:])
}

// salamander returns a GCM ciphertext with tag that opens under both keys:
// everything is free but the last block, which makes the two tags equal.
func salamander(t *testing.T, key1, key2, aad []byte) []byte {
	h1, mask1 := gcmSecrets(t, key1)
	h2, mask2 := gcmSecrets(t, key2)
	ct := append(bytes.Repeat([]byte{0xab}, 32), make([]byte, 16)...)
	difference := ghash(h1, aad, ct).add(mask1).add(ghash(h2, aad, ct)).add(mask2)
	// The last block is multiplied by h^2: by h for itself and for the lengths.
	last := difference.mul(h1.mul(h1).add(h2.mul(h2)).inverse())
	copy(ct[32:], last.bytes())
	return append(ct, ghash(h1, aad, ct).add(mask1).bytes()...)
}

// TestCommitment makes one GCM ciphertext that two keys open (Dodis, Grubbs,
// Ristenpart, Woodage: Fast Message Franking, 2018) and wants the format to
// refuse it under the key that it was not committed to.
func TestCommitment(t *testing.T) {
	m1, m2 := newKey(t, kms.AES256GCM, 1), newKey(t, kms.AES256GCM, 2)
	header := append(appendHeader(nil, testID, 2), bytes.Repeat([]byte{9}, nonceSize)...)
	aad := must[[]byte](t)(appendContext(header, Context{"n": "v"}))
	var keys [2]messageKeys
	for i, m := range []*Material{m1, m2} {
		if err := keys[i].fromSource(bg, m.source, header, aad); err != nil {
			t.Fatal(err)
		}
	}
	sealed := salamander(t, keys[0].key(), keys[1].key(), aad)
	for i := range keys {
		aead, err := newGCM(keys[i].key())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := aead.Open(nil, zeroNonce[:], sealed, aad); err != nil {
			t.Fatal("the crafted ciphertext does not open under both keys: the test proves nothing")
		}
	}
	for i := range keys {
		ct := append(append(bytes.Clone(header), keys[i].commitment()...), sealed...)
		for j, m := range []*Material{m1, m2} {
			got, err := m.Decrypt(bg, Context{"n": "v"}, ct)
			if i == j {
				if err != nil || len(got) != 48 {
					t.Errorf("key %d does not open what is committed to it: %v", j, err)
				}
				continue
			}
			wantErrOpen(t, "the key that it is not committed to", err)
		}
	}
}

// TestContextIsCommitted wants the commitment to depend on the encryption
// context: with the key known, a GCM tag alone can be made to fit two of them.
func TestContextIsCommitted(t *testing.T) {
	m := newKey(t, kms.AES256GCM, 1)
	header := append(appendHeader(nil, testID, 2), bytes.Repeat([]byte{9}, nonceSize)...)
	commitments := map[string]bool{}
	for _, c := range []Context{nil, {"a": "1"}, {"a": "2"}, {"b": "1"}} {
		aad := must[[]byte](t)(appendContext(header, c))
		var keys messageKeys
		if err := keys.fromSource(bg, m.source, header, aad); err != nil {
			t.Fatal(err)
		}
		commitments[string(keys.commitment())] = true
	}
	if len(commitments) != 4 {
		t.Error("two encryption contexts have the same commitment")
	}
}
