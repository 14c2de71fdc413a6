package engine

import (
	"context"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/state"
)

// residents are nodes as the makers of keys of protection hardware need them.
func residents(nodes []state.Node) []keyring.Resident {
	out := make([]keyring.Resident, len(nodes))
	for i, n := range nodes {
		out[i] = keyring.Resident{
			Recipient:  keyring.Recipient{Node: n.ID, Suite: n.Suite, PublicKey: n.Agreement},
			ImportKind: n.ImportKind, Import: n.Import,
		}
	}
	return out
}

// rootOf returns the number of a node's present root.
func rootOf(nodes []state.Node, id string) uint32 {
	for _, n := range nodes {
		if n.ID == id {
			return n.Root
		}
	}
	return 0
}

// newDeviceVersion makes a key version of protection hardware for the devices of
// the resident nodes, and commits to the check values of the nodes given. A sign
// key has none: its receipts are signatures under its public key.
func (e *Engine) newDeviceVersion(ctx context.Context, st *state.State, kr state.Keyring, b keyring.KeyBinding, checked []state.Node) (v newMaterial, err error) {
	if !st.Resident(kr.Name, e.node) {
		return v, e.notResident(st, kr.Name, kr.Residency)
	}
	nodes := st.ResidentNodes(kr.Name)
	made, err := e.cfg.Root.MakeVersion(ctx, e.node, e.cfg.Device, e.cfg.Importers, b, residents(nodes))
	if err != nil {
		return v, err
	}
	if made.Generated == kms.OnHost {
		defer e.cfg.Cache.Scrub()
	}
	return deviceVersion(ctx, made, b, nodes, checked)
}

// deviceVersion is a version of protection hardware as it goes into a command. It
// destroys the version's material.
func deviceVersion(ctx context.Context, made *keyring.NewVersion, b keyring.KeyBinding, nodes, checked []state.Node) (v newMaterial, err error) {
	defer made.Material.Destroy()
	v.public, v.generated = made.Public, made.Generated
	for _, c := range made.Copies {
		v.copies = append(v.copies, state.SealedCopy{Node: c.Node, Root: rootOf(nodes, c.Node), Sealed: c.Sealed})
	}
	if b.Purpose == kms.Sign {
		return v, nil
	}
	for _, n := range checked {
		kcv, err := made.Material.CheckValue(ctx, n.ID)
		if err != nil {
			return v, err
		}
		v.checks = append(v.checks, state.Check{Node: n.ID, Hash: keyring.CheckHash(kcv)})
	}
	return v, nil
}
