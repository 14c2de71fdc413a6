package state

import (
	"github.com/conclave-kms/conclave/kms"
)

// material is how a command brings a key version: wrapped under the KEK for
// protection software; for protection hardware as copies wrapped for the devices
// of the resident nodes, one each.
type material struct {
	kek       uint32
	wrapped   []byte
	copies    []SealedCopy
	generated kms.Generated
}

func (c CreateKey) material() material { return material{c.KEK, c.Wrapped, c.Copies, c.Generated} }

func (c CommitRotation) material() material {
	return material{c.KEK, c.Wrapped, c.Copies, c.Generated}
}

// hardware reports which of the two forms the material has.
func (m material) hardware() bool { return len(m.copies) > 0 || m.generated != "" }

// validate checks that the material has one of the two forms, and nothing of the
// other.
func (m material) validate() error {
	if !m.hardware() {
		if m.kek == 0 {
			return kms.Errorf(kms.Invalid, "the KEK version is missing")
		}
		return checkWrapped(m.wrapped)
	}
	switch {
	case m.kek != 0 || len(m.wrapped) != 0:
		return kms.Errorf(kms.Invalid, "material comes under a KEK (protection %s) or in copies for devices (protection %s), not both", kms.Software, kms.Hardware)
	case m.generated != kms.InDevice && m.generated != kms.OnHost:
		return kms.Errorf(kms.Invalid, "generated %q is none of %s, %s", m.generated, kms.InDevice, kms.OnHost)
	}
	return validateCopies(m.copies)
}

// placeholder stands in for material that is destroyed, in the form that it had.
func placeholder(g kms.Generated) (wrapped []byte, copies []SealedCopy) {
	if g == "" {
		return []byte{0}, nil
	}
	return nil, []SealedCopy{{Node: "erased", Root: 1, Sealed: []byte{0}}}
}

// checkMaterial holds material against the keyring that it is for, and copies
// against the roots that the resident nodes have now.
func (t *tx) checkMaterial(k Keyring, alg kms.Algorithm, m material) error {
	if hardware := k.Protection == kms.Hardware; hardware != m.hardware() {
		return kms.Errorf(kms.Invalid, "keyring %s has protection %s; the material has the form of the other one", k.Name, k.Protection)
	}
	if err := t.reader().allowMaterial(k, alg); err != nil {
		return err
	}
	if !m.hardware() {
		if m.kek != k.KEK {
			return kms.Errorf(kms.Conflict, "the material is wrapped under KEK version %d; keyring %s now uses %d", m.kek, k.Name, k.KEK)
		}
		return nil
	}
	if err := hardwareAlgorithm(k, alg); err != nil {
		return err
	}
	nodes := t.reader().residents(k.Residency)
	if err := sameKind(t.env.Origin, nodes, m.generated); err != nil {
		return err
	}
	if t.claimed != nil {
		return nil // the copies went with the command
	}
	return checkCopies(nodes, m.copies)
}

// hardwareAlgorithm refuses what devices do not offer.
func hardwareAlgorithm(k Keyring, alg kms.Algorithm) error {
	if alg == kms.Ed25519 {
		return kms.Errorf(kms.Invalid, "keyring %s has protection %s, where %s is not offered; use %s or %s", k.Name, kms.Hardware, alg, kms.ECDSAP256, kms.ECDSAP384)
	}
	return nil
}

// sameKind refuses the claim that a device wrapped its key itself for a device of
// another kind: no device can.
func sameKind(origin string, nodes []Node, g kms.Generated) error {
	from, _ := search(nodes, func(n Node) bool { return n.ID == origin })
	for _, n := range nodes {
		if g == kms.InDevice && n.ImportKind != from.ImportKind {
			return kms.Errorf(kms.Invalid, "the device of node %s cannot have wrapped a key for that of node %s, which is of another kind", origin, n.ID)
		}
	}
	return nil
}

// checkCopies checks that there is one copy for every node's present root.
func checkCopies(nodes []Node, copies []SealedCopy) error {
	if err := exactly("sealed copy", nodes, func(i int) string { return copies[i].Node }, len(copies)); err != nil {
		return err
	}
	for i, n := range nodes {
		if copies[i].Root != n.Root {
			return kms.Errorf(kms.Conflict, "the copy for node %s is sealed to its root number %d; it now has number %d", n.ID, copies[i].Root, n.Root)
		}
	}
	return nil
}

// signsReceipts reports whether receipts for the version are its own signatures:
// it signs, and its protection is hardware.
func (v Version) signsReceipts() bool { return v.Generated != "" && len(v.PublicKey) > 0 }

// verify checks the signature by which a node shows that its device can use a sign
// key's version. What is not there is for apply to say.
func (c GiveReceipt) verify(t *tx) error {
	r := t.reader()
	v, ok := r.version(c.Keyring, c.Key, c.Version)
	if !ok || !v.signsReceipts() {
		return nil
	}
	k, _ := r.key(c.Keyring, c.Key)
	message := kms.ReceiptMessage(t.before.cluster, c.Keyring, kms.KeyID(k.ID), c.Version, t.env.Origin)
	return kms.VerifyReceipt(k.Algorithm, v.PublicKey, message, c.KCV)
}
