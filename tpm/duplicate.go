package tpm

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/rand"
	"encoding/binary"
	"fmt"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/kms/secret"
)

// duplicate wraps a key in an outer duplication wrapper (Part 1, 23.3). go-tpm's
// CreateDuplicate does the same, but leaves copies of the key in ordinary
// memory; here it is in locked memory until it is encrypted.
func (s *suite) duplicate(storage tpm2.LabeledEncapsulationKey, kind importType, label []byte, pub tpm2.TPMTPublic, seedValue []byte, key *secret.Bytes) ([]byte, error) {
	b := &importBlob{version: importVersion, kind: kind, label: label, pub: tpm2.Marshal(pub)}
	plain, err := marshalSensitive(pub.Type, seedValue, key)
	if err != nil {
		return nil, fmt.Errorf("tpm: making a key blob: %w", err)
	}
	defer plain.Destroy()
	seed, point, err := storage.Encapsulate(rand.Reader, "DUPLICATE")
	if err != nil {
		return nil, fmt.Errorf("tpm: making a key blob: %w", err)
	}
	defer secret.Wipe(seed)
	b.point = point
	if b.duplicate, err = s.outerWrap(seed, s.objectName(b.pub), plain); err != nil {
		return nil, fmt.Errorf("tpm: making a key blob: %w", err)
	}
	return b.encode(), nil
}

// marshalSensitive is a TPM2B_SENSITIVE (Part 2, 12.3.2) with the empty
// authorization value.
func marshalSensitive(kind tpm2.TPMIAlgPublic, seedValue []byte, key *secret.Bytes) (*secret.Bytes, error) {
	const sizes = 2 + 2 + 2 + 2 // type, authorization value, seed, key
	out, err := secret.New(2 + sizes + len(seedValue) + key.Len())
	if err != nil {
		return nil, err
	}
	b := binary.BigEndian.AppendUint16(out.Reveal()[:0], uint16(out.Len()-2))
	b = binary.BigEndian.AppendUint16(b, uint16(kind))
	b = binary.BigEndian.AppendUint16(b, 0)
	for _, part := range [][]byte{seedValue, key.Reveal()} {
		b = binary.BigEndian.AppendUint16(b, uint16(len(part)))
		b = append(b, part...)
	}
	return out, nil
}

// outerWrap encrypts and authenticates a sensitive area: TPM2B_DIGEST, then AES in
// CFB mode with a zero IV, under keys from the seed.
func (s *suite) outerWrap(seed, name []byte, plain *secret.Bytes) ([]byte, error) {
	hash := s.digestOf()
	encryptionKey := tpm2.KDFa(hash, seed, "STORAGE", name, nil, int(s.aesBits))
	defer secret.Wipe(encryptionKey)
	integrityKey := tpm2.KDFa(hash, seed, "INTEGRITY", nil, nil, 8*hash.Size())
	defer secret.Wipe(integrityKey)
	block, err := aes.NewCipher(encryptionKey)
	if err != nil {
		return nil, err
	}
	encrypted := make([]byte, plain.Len())
	//lint:ignore SA1019 the TPM knows no other mode here; the HMAC below authenticates
	cipher.NewCFBEncrypter(block, make([]byte, block.BlockSize())).XORKeyStream(encrypted, plain.Reveal())
	mac := hmac.New(hash.New, integrityKey)
	mac.Write(encrypted)
	mac.Write(name)
	out := binary.BigEndian.AppendUint16(nil, uint16(hash.Size()))
	return append(mac.Sum(out), encrypted...), nil
}
