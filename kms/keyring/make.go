package keyring

import (
	"cmp"
	"context"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
)

// Resident is a node that a key version of protection hardware is made for.
type Resident struct {
	Recipient
	ImportKind string // how its device takes keys
	Import     []byte // what wraps for it
}

// NewVersion is a new key version of protection hardware.
type NewVersion struct {
	Material  *Material // in the device, or in locked memory; the caller destroys it
	Copies    []Sealed  // for every resident, sorted by node
	Public    []byte    // of sign keys, in the form of Generate
	Generated kms.Generated
}

// MakeVersion makes a key version of protection hardware for the devices of the
// residents, of which this node must be one. Where every device is of the import
// kind of this node's, and that can generate such keys and wrap them for the
// others, the key never leaves it. Else the key is made in locked memory from the
// device's and the system's randomness and wrapped by importers, by import kind;
// destroying the Material wipes it.
//
// Errors: kms.Invalid for a binding that cannot be, a node without an import
// kind, or with one that there is no importer of; kms.Unavailable for a device
// that fails: only one that says that it cannot is replaced by the other way.
func (r *Root) MakeVersion(ctx context.Context, node string, random Random, importers map[string]Importer, b KeyBinding, residents []Resident) (*NewVersion, error) {
	if err := b.validate(kms.Hardware); err != nil {
		return nil, err
	}
	residents = slices.SortedFunc(slices.Values(residents), func(x, y Resident) int { return cmp.Compare(x.Node, y.Node) })
	own := slices.IndexFunc(residents, func(x Resident) bool { return x.Node == node })
	if own < 0 {
		return nil, kms.Errorf(kms.Invalid, "a key version of protection hardware is made at a node of its residency")
	}
	if err := CheckResidents(residents); err != nil {
		return nil, err
	}
	var v *NewVersion
	var blobs [][]byte
	var err error
	gen := r.generator(b.Purpose)
	if gen != nil && sameKind(residents, residents[own].ImportKind) {
		v, blobs, err = generateInDevice(ctx, gen, b, residents)
	}
	if v == nil && (err == nil || unsupported(err)) {
		v, blobs, err = generateOnHost(ctx, random, importers, b, residents)
	}
	if err != nil {
		return nil, err
	}
	if err := v.seal(b, residents, blobs); err != nil {
		v.Material.Destroy()
		return nil, err
	}
	return v, nil
}

// CheckResidents refuses residents whose devices cannot all have keys of
// protection hardware, naming the first that cannot, and one named twice:
// kms.Invalid.
func CheckResidents(residents []Resident) error {
	for i, x := range residents {
		if x.ImportKind == "" {
			return &kms.Error{Kind: kms.Invalid, Msg: "the device of node " + x.Node + " cannot have keys of protection hardware: it says no way to import them",
				Fix: "leave its site out of the residency, replace the node's hardware root, or use protection software"}
		}
		if slices.ContainsFunc(residents[:i], func(y Resident) bool { return y.Node == x.Node }) {
			return kms.Errorf(kms.Invalid, "node %q is named twice as a recipient", x.Node)
		}
	}
	return nil
}

func sameKind(residents []Resident, kind string) bool {
	return !slices.ContainsFunc(residents, func(x Resident) bool { return x.ImportKind != kind })
}

// generator returns the device if it makes keys of the purpose, else nil.
func (r *Root) generator(p kms.Purpose) Generator {
	gen, ok := r.hardware.(Generator)
	if !ok {
		return nil
	}
	mac, signer := gen.Generates()
	if p == kms.Sign && signer || p != kms.Sign && mac {
		return gen
	}
	return nil
}

func generateInDevice(ctx context.Context, gen Generator, b KeyBinding, residents []Resident) (*NewVersion, [][]byte, error) {
	v := &NewVersion{Generated: kms.InDevice}
	recipients := make([][]byte, len(residents))
	for i, x := range residents {
		recipients[i] = x.Import
	}
	if b.Purpose != kms.Sign {
		blobs, mac, unload, err := gen.GenerateHMAC(ctx, recipients)
		if err != nil {
			return nil, nil, deviceError(err, "generate the key")
		}
		v.Material = inDevice(b, mac, nil, unload)
		return v, blobs, nil
	}
	blobs, public, sign, unload, err := gen.GenerateSigner(ctx, ecdhCurve(b.Algorithm), recipients)
	if err != nil {
		return nil, nil, deviceError(err, "generate the key")
	}
	v.Material = inDevice(b, nil, sign, unload)
	if v.Public, err = public.Bytes(); err != nil || public.Curve != curveOf(b.Algorithm) {
		unload()
		return nil, nil, kms.Wrap(kms.Unavailable, err, "the device of this node returned a public key that is not of "+string(b.Algorithm), deviceFix)
	}
	return v, blobs, nil
}

func generateOnHost(ctx context.Context, random Random, importers map[string]Importer, b KeyBinding, residents []Resident) (*NewVersion, [][]byte, error) {
	if err := known(importers, residents); err != nil {
		return nil, nil, err
	}
	cleanStack()
	defer cleanStack()
	entropy, err := Entropy(ctx, random)
	if err != nil {
		return nil, nil, err
	}
	defer entropy.Destroy()
	material, public, err := Generate(b.Algorithm, entropy.Reveal())
	if err != nil {
		return nil, nil, err
	}
	m, err := takeMaterial(b, kms.Hardware, material)
	if err != nil {
		return nil, nil, err
	}
	blobs, err := wrapOnHost(importers, b, material, residents)
	if err != nil {
		m.Destroy()
		return nil, nil, err
	}
	return &NewVersion{Material: m, Public: public, Generated: kms.OnHost}, blobs, nil
}

// known refuses residents for whose devices there is no importer.
func known(importers map[string]Importer, residents []Resident) error {
	for _, x := range residents {
		if i, ok := importers[x.ImportKind]; !ok || i.WrapHMAC == nil || i.WrapSigner == nil {
			return &kms.Error{Kind: kms.Invalid, Msg: "this program does not know how to wrap a key for the device of node " + x.Node + ", import kind " + x.ImportKind,
				Fix: "run a release at this node that does"}
		}
	}
	return nil
}

// wrapOnHost wraps material in this process for every resident's device.
func wrapOnHost(importers map[string]Importer, b KeyBinding, material *secret.Bytes, residents []Resident) ([][]byte, error) {
	blobs := make([][]byte, len(residents))
	for i, x := range residents {
		var err error
		imp := importers[x.ImportKind]
		if b.Purpose == kms.Sign {
			blobs[i], err = imp.WrapSigner(x.Import, ecdhCurve(b.Algorithm), material, nil)
		} else {
			blobs[i], err = imp.WrapHMAC(x.Import, material, nil)
		}
		if err != nil {
			return nil, kms.Wrap(kms.Invalid, err, "the key cannot be wrapped for the device of node "+x.Node, "")
		}
	}
	return blobs, nil
}

// seal seals every blob to its node.
func (v *NewVersion) seal(b KeyBinding, residents []Resident, blobs [][]byte) error {
	if len(blobs) != len(residents) {
		return kms.Errorf(kms.Unavailable, "the device of this node wrapped a key for %d devices in place of %d", len(blobs), len(residents))
	}
	for i, x := range residents {
		sealed, err := SealVersion(x.Recipient, b, blobs[i])
		if err != nil {
			return err
		}
		v.Copies = append(v.Copies, Sealed{Node: x.Node, Sealed: sealed})
	}
	return nil
}
