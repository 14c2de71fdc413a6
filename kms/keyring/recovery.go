package keyring

import (
	"bytes"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
)

// OpenRecoveryKEK opens a copy of a KEK version that was sealed to a recovery key,
// which b.Node names (SealKEK with that name as recipient). The caller destroys the
// KEK. Errors: kms.Invalid, kms.ErrOpen.
func OpenRecoveryKEK(priv *pqc.PrivateKey, b KEKBinding, sealed []byte) (*secret.Bytes, error) {
	if err := b.validate(); err != nil {
		return nil, err
	}
	kek, err := priv.Open(b.encode(sealInfo), b.encode(sealAAD), sealed)
	if err != nil {
		return nil, kms.ErrOpen
	}
	s, err := secret.Move(kek)
	if err != nil {
		return nil, noMemory(err)
	}
	if s.Len() != KEKSize {
		s.Destroy()
		return nil, kms.ErrOpen
	}
	return s, nil
}

// IsKEK reports whether a KEK is the one whose check value for a node has the hash.
func IsKEK(kek *secret.Bytes, cluster, keyring string, version uint32, node string, hash []byte) bool {
	return bytes.Equal(CheckHash(CheckValue(kek, cluster, keyring, kms.KeyID{}, version, node)), hash)
}
