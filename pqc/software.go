package pqc

import (
	"crypto/ecdh"
	"crypto/fips140"
	"crypto/sha3"
	"encoding/binary"
	"fmt"
	"runtime"

	"github.com/conclave-kms/conclave/kms/secret"
)

// hpkeSeedSize is the length of the seed from which draft-ietf-hpke-pq expands
// both halves of a hybrid private key.
const hpkeSeedSize = 32

// SoftwareKey is a PrivateKey whose two halves come from one 32-byte seed and
// live in memory, for holders without a device. It opens as PrivateKey does.
type SoftwareKey struct {
	*PrivateKey
	seed *secret.Bytes
}

// GenerateKey makes a new software key of a KEM suite. Errors: ErrSuite, or no
// memory can be locked.
func GenerateKey(suite SuiteID) (*SoftwareKey, error) {
	if _, err := lookupKEM(suite); err != nil {
		return nil, err
	}
	seed, err := randomSecret(nil, hpkeSeedSize)
	if err != nil {
		return nil, err
	}
	defer seed.Destroy()
	return NewSoftwareKey(suite, seed)
}

// NewSoftwareKey expands the key of the given 32-byte seed as
// draft-ietf-hpke-pq does, so that it equals the key that any other HPKE
// implementation makes of that seed. It keeps a copy of seed.
// Errors: ErrSuite, ErrKey.
func NewSoftwareKey(suite SuiteID, seed *secret.Bytes) (*SoftwareKey, error) {
	s, err := lookupKEM(suite)
	if err != nil {
		return nil, err
	}
	if seed.Len() != hpkeSeedSize {
		return nil, fmt.Errorf("%w: the seed of %v has %d bytes", ErrKey, suite, hpkeSeedSize)
	}
	xof := sha3.NewSHAKE256()
	_, _ = xof.Write(seed.Reveal())
	buf := make([]byte, MLKEMSeedSize)
	_, _ = xof.Read(buf)
	pq, err := secret.Move(buf)
	if err != nil {
		return nil, err
	}
	defer pq.Destroy()
	priv, err := NewPrivateKey(suite, pq, classicalKey(s, xof))
	if err != nil {
		return nil, err
	}
	keep, err := secret.Copy(seed.Reveal())
	runtime.KeepAlive(seed)
	if err != nil {
		return nil, err
	}
	return &SoftwareKey{PrivateKey: priv, seed: keep}, nil
}

// classicalKey reads candidates from xof until one is a valid scalar, which for
// the curves of the table is the first but for a chance below 2^-31.
func classicalKey(s *kemSuite, xof *sha3.SHAKE) *ecdh.PrivateKey {
	scalar := make([]byte, s.seedSize)
	defer secret.Wipe(scalar)
	for {
		_, _ = xof.Read(scalar)
		var key *ecdh.PrivateKey
		var err error
		fips140.WithoutEnforcement(func() { key, err = s.curve.NewPrivateKey(scalar) })
		if err == nil {
			return key
		}
	}
}

// Marshal returns the private key in seed form: suite id (2 bytes, big endian)
// ‖ seed (32 bytes). The caller encrypts, stores and destroys it.
func (k *SoftwareKey) Marshal() (*secret.Bytes, error) {
	if k.seed.Len() != hpkeSeedSize {
		return nil, fmt.Errorf("%w: it was destroyed", ErrKey)
	}
	out, err := secret.New(2 + hpkeSeedSize)
	if err != nil {
		return nil, err
	}
	binary.BigEndian.PutUint16(out.Reveal(), uint16(k.Suite()))
	copy(out.Reveal()[2:], k.seed.Reveal())
	runtime.KeepAlive(k)
	return out, nil
}

// ParseSoftwareKey reads what Marshal wrote; b stays the caller's. Errors:
// ErrSuite, ErrKey.
func ParseSoftwareKey(b *secret.Bytes) (*SoftwareKey, error) {
	if b.Len() != 2+hpkeSeedSize {
		return nil, fmt.Errorf("%w: a software key in seed form has %d bytes", ErrKey, 2+hpkeSeedSize)
	}
	seed, err := secret.Copy(b.Reveal()[2:])
	if err != nil {
		return nil, err
	}
	defer seed.Destroy()
	id := SuiteID(binary.BigEndian.Uint16(b.Reveal()))
	runtime.KeepAlive(b)
	return NewSoftwareKey(id, seed)
}

// Destroy zeroises the seed. The expanded halves are left to the garbage
// collector; the key must not be used afterwards.
func (k *SoftwareKey) Destroy() { k.seed.Destroy() }
