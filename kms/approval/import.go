package approval

import (
	"crypto/sha256"
	"slices"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
)

// MaxImportPeriod is the longest rotation period of an imported key, in milliseconds.
const MaxImportPeriod = int64(3650 * 24 * time.Hour / time.Millisecond)

// ImportParams are the parameters of the action import: the key that is to be made of
// material which its owner has sealed to a node. The material is no part of them.
type ImportParams struct {
	Node           string        `cbor:"node" json:"node"` // resident node to whose agreement key the material is sealed
	Purpose        kms.Purpose   `cbor:"purpose" json:"purpose"`
	Algorithm      kms.Algorithm `cbor:"algorithm" json:"algorithm"`
	RotationPeriod int64         `cbor:"rotation-period" json:"rotation_period_ms,omitempty"` // milliseconds, 0: on request only
	PublicKey      []byte        `cbor:"public-key" json:"public_key,omitempty"`              // of a sign key, in the form of the key version
	Sealed         []byte        `cbor:"sealed" json:"sealed"`                                // SHA-256 of the sealed material
}

// ImportParams decodes the parameters of the action import.
func (p Proposal) ImportParams() (ImportParams, error) { return params[ImportParams](p) }

func (p Proposal) validateImport() error {
	params, err := p.ImportParams()
	if err != nil {
		return err
	}
	if p.Revision != 0 {
		return kms.Errorf(kms.Invalid, "an import makes a key that is not there yet, so it is about revision 0")
	}
	return params.Validate()
}

// Validate checks the shape. Whether the public key is one of the algorithm is for
// whoever has the key to say. Errors: kms.Invalid.
func (i ImportParams) Validate() error {
	if err := kms.CheckName("node", i.Node); err != nil {
		return err
	}
	switch {
	case !slices.Contains(i.Purpose.Algorithms(), i.Algorithm):
		return kms.Errorf(kms.Invalid, "algorithm %q is not for purpose %q", string(i.Algorithm), string(i.Purpose))
	case i.RotationPeriod < 0 || i.RotationPeriod > MaxImportPeriod:
		return kms.Errorf(kms.Invalid, "the rotation period is %d ms; it must be from 0 (on request only) to ten years", i.RotationPeriod)
	case (i.Purpose == kms.Sign) != (len(i.PublicKey) > 0) || len(i.PublicKey) > MaxRootKey:
		return kms.Errorf(kms.Invalid, "the public key belongs to the import of a sign key, and to no other")
	case len(i.Sealed) != sha256.Size:
		return kms.Errorf(kms.Invalid, "the hash of the sealed material has %d bytes, not %d", len(i.Sealed), sha256.Size)
	}
	return nil
}

const (
	importInfo = "conclave/import/1/info"
	importAAD  = "conclave/import/1/aad"
)

// ImportBinding returns the HPKE info and AAD under which the material of a key is
// sealed to a node for an import: the canonical encoding of everything that it is bound
// to, each under a domain string of its own.
func ImportBinding(cluster, keyring, key, node string, purpose kms.Purpose, algorithm kms.Algorithm) (info, aad []byte) {
	bind := func(domain string) []byte {
		return canon.Marshal(struct {
			Domain    string        `cbor:"domain"`
			Cluster   string        `cbor:"cluster"`
			Keyring   string        `cbor:"keyring"`
			Key       string        `cbor:"key"`
			Node      string        `cbor:"node"`
			Purpose   kms.Purpose   `cbor:"purpose"`
			Algorithm kms.Algorithm `cbor:"algorithm"`
		}{domain, cluster, keyring, key, node, purpose, algorithm})
	}
	return bind(importInfo), bind(importAAD)
}
