package keyring

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"runtime"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
)

// OpenImport opens material that its owner has sealed to this node for an import, and
// checks it as CheckImport does; for a sign key it returns the public key too. The
// caller destroys the material. What was not sealed to this node under exactly info and
// aad is kms.ErrOpen; a device that does not answer, or ctx ending first, is
// kms.Unavailable with the cause wrapped; material that may not be used is kms.Invalid.
func (r *Root) OpenImport(ctx context.Context, info, aad, sealed []byte, a kms.Algorithm) (*secret.Bytes, []byte, error) {
	priv := r.priv.WithExchanger(exchanger{ctx: ctx, dev: r.dev, pub: r.pub})
	b, err := priv.Open(info, aad, sealed)
	switch {
	case errors.Is(err, pqc.ErrDevice):
		return nil, nil, deviceError(err, "open the sealed material")
	case err != nil:
		return nil, nil, kms.ErrOpen
	}
	s, err := secret.Move(b)
	if err != nil {
		return nil, nil, noMemory(err)
	}
	public, err := CheckImport(a, s)
	if err != nil {
		s.Destroy()
		return nil, nil, err
	}
	return s, public, nil
}

// CheckImport refuses material that is not of the algorithm, or that nobody makes at
// random: few distinct bytes, a sequence, text, a private scalar close to 0 or to the
// order of its curve. A uniformly random key is refused with a probability below 2^-40.
// It returns the public key of a sign key, in the form of Generate. Errors: kms.Invalid,
// without a word about the material.
func CheckImport(a kms.Algorithm, material *secret.Bytes) ([]byte, error) {
	defer runtime.KeepAlive(material)
	size := materialSize(a)
	if size == 0 {
		return nil, kms.Errorf(kms.Invalid, "unknown algorithm %q", string(a))
	}
	if material.Len() != size {
		return nil, kms.Errorf(kms.Invalid, "material of %s has %d bytes, not %d", string(a), size, material.Len())
	}
	if weak(a, material.Reveal()) {
		return nil, &kms.Error{Kind: kms.Invalid, Msg: "the material is not random: it has a pattern, is text, or is a number close to a bound of its range",
			Fix: "import a key that a good random generator has made; give its bytes, not their hexadecimal or base64 form"}
	}
	cleanStack()
	defer cleanStack()
	return publicKeyOf(a, material)
}

// weak looks at the material in a time that depends on whether it is weak alone.
func weak(a kms.Algorithm, b []byte) bool {
	return fewBytes(b) || sequence(b) || printable(b) || (a == kms.ECDSAP256 || a == kms.ECDSAP384) && nearBound(a, b)
}

// fewBytes: of 32 random bytes 16 or more differ, but with a probability of 2^-48.
func fewBytes(b []byte) bool {
	var seen [256]byte
	for i := range seen {
		for _, x := range b {
			seen[i] |= equal(byte(i), x)
		}
	}
	n := 0
	for _, s := range seen {
		n += int(s)
	}
	clear(seen[:])
	return n < 16
}

// equal is 1 if x and y are the same.
func equal(x, y byte) byte { return byte((uint32(x^y) - 1) >> 31) }

// sequence: every byte differs from the one before by the same amount.
func sequence(b []byte) bool {
	var differ byte
	for i := 2; i < len(b); i++ {
		differ |= (b[i] - b[i-1]) ^ (b[1] - b[0])
	}
	return differ == 0
}

// printable: hexadecimal, base64 or a password, where bytes were meant.
func printable(b []byte) bool {
	var other byte
	for _, x := range b {
		other |= byte((uint32(x)-0x20)>>31) | byte((0x7e-uint32(x))>>31)
	}
	return other == 0
}

// nearBound: the scalar or its negative has its first eight bytes zero.
func nearBound(a kms.Algorithm, b []byte) bool {
	n := curveOf(a).Params().N.FillBytes(make([]byte, len(b)))
	neg := make([]byte, len(b))
	defer secret.Wipe(neg)
	borrow := 0
	for i := len(b) - 1; i >= 0; i-- {
		d := int(n[i]) - int(b[i]) - borrow
		borrow = d >> 8 & 1
		neg[i] = byte(d)
	}
	zero := make([]byte, 8)
	return bytes.Equal(b[:8], zero) || bytes.Equal(neg[:8], zero)
}

// ImportVersion makes a key version of protection hardware of material from outside: it
// wraps it in this process for the devices of the residents, of which this node must be
// one. The material is the Material's from then on, also after an error. Errors:
// kms.Invalid, as of MakeVersion.
func (r *Root) ImportVersion(node string, importers map[string]Importer, b KeyBinding, residents []Resident, material *secret.Bytes, public []byte) (*NewVersion, error) {
	m, err := takeMaterial(b, kms.Hardware, material)
	if err != nil {
		return nil, err
	}
	v := &NewVersion{Material: m, Public: public, Generated: kms.OnHost}
	residents = slices.SortedFunc(slices.Values(residents), func(x, y Resident) int { return cmp.Compare(x.Node, y.Node) })
	blobs, err := v.wrap(node, importers, residents)
	if err == nil {
		err = v.seal(b, residents, blobs)
	}
	if err != nil {
		m.Destroy()
		return nil, err
	}
	return v, nil
}

func (v *NewVersion) wrap(node string, importers map[string]Importer, residents []Resident) ([][]byte, error) {
	if !slices.ContainsFunc(residents, func(x Resident) bool { return x.Node == node }) {
		return nil, kms.Errorf(kms.Invalid, "a key version of protection hardware is made at a node of its residency")
	}
	if err := CheckResidents(residents); err != nil {
		return nil, err
	}
	if err := known(importers, residents); err != nil {
		return nil, err
	}
	return wrapOnHost(importers, v.Material.binding, v.Material.bytes, residents)
}
