package keyring

import (
	"bytes"
	"runtime"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
)

// Rewrap moves the material of a key version from one KEK version to another: it
// opens wrapped, which is as from says, and wraps the material under the other KEK with
// the binding of the other version. from names the KEK version that wraps it now, to
// the other one. The material is in locked memory meanwhile. Errors as of
// UnwrapMaterial and WrapMaterial; kms.Invalid also for material that is not of the
// binding's algorithm.
func Rewrap(old, next *secret.Bytes, from KeyBinding, to uint32, wrapped []byte) ([]byte, error) {
	m, err := UnwrapMaterial(old, from, wrapped)
	if err != nil {
		return nil, err
	}
	defer m.Destroy()
	from.KEK = to
	return WrapMaterial(next, from, m)
}

// Wrapping is a key version wrapped under an opened KEK.
type Wrapping struct {
	KEK     *secret.Bytes // nil: not open here
	Version uint32        // of the KEK
	Wrapped []byte
}

// open returns the material, and its public key for a sign key.
func (w Wrapping) open(b KeyBinding) (*Material, error) {
	b.KEK = w.Version
	material, err := UnwrapMaterial(w.KEK, b, w.Wrapped)
	if err != nil {
		return nil, err
	}
	m, err := NewMaterial(b, material)
	if kms.KindOf(err) == kms.Invalid {
		return nil, kms.ErrOpen // unwrapped, and yet not a key of its algorithm
	}
	return m, err
}

// SameMaterial checks, for one node, that a key version as it is to be wrapped opens
// and holds what it held: the same material as old or, where this node cannot open
// that, material whose check value for the node has the committed hash. Where there is
// neither there is nothing to lose, and that it opens is enough. Of a sign key the
// public key must be the one given. kms.ErrOpen says that it is not good; kms.Unavailable
// that no memory could be locked.
func SameMaterial(b KeyBinding, node string, old, next Wrapping, check, public []byte) error {
	m, err := next.open(b)
	if err != nil {
		return err
	}
	defer m.Destroy()
	if b.Purpose == kms.Sign && !bytes.Equal(m.public, public) {
		return kms.ErrOpen
	}
	was := b
	was.KEK = old.Version
	before, err := (*secret.Bytes)(nil), error(kms.ErrOpen)
	if old.KEK != nil {
		before, err = UnwrapMaterial(old.KEK, was, old.Wrapped)
	}
	switch {
	case err == nil:
		defer before.Destroy()
		same := before.Equal(m.bytes)
		runtime.KeepAlive(m)
		if !same {
			return kms.ErrOpen
		}
		return nil
	case kms.KindOf(err) != kms.OpenFailed:
		return err
	case len(check) == 0:
		return nil
	}
	kcv := CheckValue(m.bytes, b.Cluster, b.Keyring, b.KeyID, b.Version, node)
	runtime.KeepAlive(m)
	if !bytes.Equal(CheckHash(kcv), check) {
		return kms.ErrOpen
	}
	return nil
}

// ForgetKEK drops an opened KEK version of a keyring and what was opened under it: for
// one that was retired.
func (c *Cache) ForgetKEK(keyring string, version uint32) {
	c.keks.forget(func(b KEKBinding) bool { return b.Keyring == keyring && b.Version == version })
	for _, s := range c.keys {
		s.forget(func(b KeyBinding) bool { return b.Keyring == keyring && b.KEK == version })
	}
}
