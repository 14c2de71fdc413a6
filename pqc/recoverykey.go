package pqc

import (
	"crypto/hkdf"
	"crypto/sha512"
	"fmt"
	"runtime"

	"github.com/conclave-kms/conclave/kms/secret"
)

// CustodianKEM is the suite of custodians' KEM keys.
const CustodianKEM = MLKEM1024P384

const custodianKEMLabel = "conclave/custodian-kem/1"

// KEMKey returns the key to which shares of recovery keys are sealed for the holder:
// its 32-byte seed is HKDF-SHA512 (RFC 5869) of the signing seed, without salt, with
// a label of its own as info, so that the same key file holds both and neither key
// tells anything of the other. The suite is CustodianKEM; the caller destroys the
// key. Errors: ErrKey after Destroy, or no memory can be locked.
func (k *HybridKey) KEMKey() (*SoftwareKey, error) {
	if k.pq == nil || k.seed.Len() != HybridSeedSize {
		return nil, fmt.Errorf("%w: it was destroyed", ErrKey)
	}
	b, err := hkdf.Key(sha512.New, k.seed.Reveal(), nil, custodianKEMLabel, hpkeSeedSize)
	runtime.KeepAlive(k)
	if err != nil {
		return nil, fmt.Errorf("pqc: derive the KEM key: %w", err)
	}
	seed, err := secret.Move(b)
	if err != nil {
		return nil, err
	}
	defer seed.Destroy()
	return NewSoftwareKey(CustodianKEM, seed)
}
