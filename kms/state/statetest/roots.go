package statetest

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/sha512"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
)

// ImportKind is how the devices of nodes in a World take keys from others.
const ImportKind = "test-import"

// RootWith returns the keys of a node's root, past, present or next, with that signing key.
func (w *World) RootWith(id string, signing []byte) *Node {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	i := slices.IndexFunc(w.nodes[id], func(n *Node) bool { return bytes.Equal(n.Record.Signing, signing) })
	if i < 0 {
		w.t.Fatalf("node %q has no such root", id)
	}
	return w.nodes[id][i]
}

// NewRoot makes the keys of another hardware root for a node.
func (w *World) NewRoot(id string) *Node {
	w.t.Helper()
	n := w.newNode(id, w.Node(id).Record.Site)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.nodes[id] = append(w.nodes[id], n)
	return n
}

// NodeParams returns the parameters of a proposal that makes a root a node's next
// one, with proof of possession for the number that it will have.
func (w *World) NodeParams(id string, root *Node, leave bool) approval.NodeParams {
	w.t.Helper()
	r := root.Record.HardwareRoot()
	m := approval.RootMessage(w.State().Cluster(), id, w.State().NextRoot(id), r)
	return approval.NodeParams{Change: approval.NodeReplaceRoot, Root: r, Possession: root.signature(w.t, m, approval.RootContext), Leave: leave}
}

// Replace makes a new root and has it approved as the node's next one.
func (w *World) Replace(id string, leave bool) *Node {
	w.t.Helper()
	n := w.NewRoot(id)
	w.Carry(kms.ActionNode, approval.NodeTarget(id), w.NodeParams(id, n, leave))
	return n
}

// ResealCommand returns the command that gives a node a copy for its next root.
func (w *World) ResealCommand(id string, p state.Pending) state.Reseal {
	next, _ := w.State().Replacement(id)
	return state.Reseal{
		Node: id, Root: next.Root, Keyring: p.Keyring, Key: p.Key, Version: p.Version,
		Sealed: hash("resealed", id, next.Root, p.Keyring, p.Key, p.Version),
	}
}

// Resealer returns the node that reseals a keyring for another one: the first that
// is resident, the node itself if there is no other.
func (w *World) Resealer(id, keyring string) string {
	all := w.State().ResidentNodes(keyring)
	if i := slices.IndexFunc(all, func(n state.Node) bool { return n.ID != id }); i >= 0 {
		return all[i].ID
	}
	return id
}

// NextResealer is Resealer among the nodes of which the next root has refused nothing of
// the version.
func (w *World) NextResealer(id string, p state.Pending) string {
	refused := w.State().Refused(id)
	for _, n := range w.State().ResidentNodes(p.Keyring) {
		by := func(x state.RefusedCopy) bool {
			return x.By == n.ID && state.Pending{Keyring: x.Keyring, Key: x.Key, Version: x.Version} == p
		}
		if n.ID != id && !slices.ContainsFunc(refused, by) {
			return n.ID
		}
	}
	return w.Resealer(id, p.Keyring)
}

// Reseal gives a node all copies that it lacks for its next root, whatever it has
// refused of other nodes.
func (w *World) Reseal(id string) {
	w.t.Helper()
	for _, p := range w.State().Unsealed(id) {
		w.Do(w.NextResealer(id, p), w.ResealCommand(id, p))
	}
}

// AdoptCommand returns the command by which a node adopts its next root.
func (w *World) AdoptCommand(id string) state.AdoptRoot {
	s := w.State()
	next, _ := s.Replacement(id)
	return state.AdoptRoot{Root: next.Root, Copies: state.AdoptionDigest(s.Cluster(), id, next.Root, s.Adoption(id))}
}

// RefuseCommand returns the command by which a node refuses the copy of a version
// for its next root, which by has sealed.
func (w *World) RefuseCommand(id string, p state.Pending, by string) state.RefuseCopy {
	s := w.State()
	next, _ := s.Replacement(id)
	c := state.RefuseCopy{Root: next.Root, Keyring: p.Keyring, Key: p.Key, Version: p.Version, By: by, Copy: hash("none")}
	for _, x := range s.Adoption(id) {
		if x.Keyring == p.Keyring && x.Key == p.Key && x.Version == p.Version && len(x.Copy) > 0 {
			c.Copy = x.Copy
		}
	}
	return c
}

// Rekey replaces a node's root, from the proposal to the adoption.
func (w *World) Rekey(id string) *Node {
	w.t.Helper()
	n := w.Replace(id, false)
	w.Reseal(id)
	w.Do(id, w.AdoptCommand(id))
	return n
}

// CreateHardwareKeyring makes a keyring of protection hardware resident at the sites.
func (w *World) CreateHardwareKeyring(name string, sites ...string) {
	w.t.Helper()
	c := w.HardwareKeyringCommand(name, sites...)
	w.Do(w.State().NodesOf(c.Residency[0])[0].ID, c, As(w.Operator(c.Residency[0])))
}

// HardwareKeyringCommand is KeyringCommand for protection hardware.
func (w *World) HardwareKeyringCommand(name string, sites ...string) state.CreateKeyring {
	c := w.KeyringCommand(name, sites...)
	c.Protection, c.Copies, c.Checks = kms.Hardware, nil, nil
	return c
}

// material turns what a key version comes with into the form of its keyring's
// protection.
func (w *World) material(keyring, key string, version uint32, purpose kms.Purpose, wrapped []byte, checks []state.Check) (uint32, []byte, []state.SealedCopy, kms.Generated, []state.Check) {
	ring, _ := w.State().Keyring(keyring)
	if ring.Protection != kms.Hardware {
		return ring.KEK, wrapped, nil, "", checks
	}
	var copies []state.SealedCopy
	for _, n := range w.State().ResidentNodes(keyring) {
		copies = append(copies, state.SealedCopy{Node: n.ID, Root: n.Root, Sealed: hash("copy", keyring, key, version, n.ID, n.Root)})
	}
	if purpose == kms.Sign {
		checks = nil
	}
	return 0, nil, copies, kms.InDevice, checks
}

// signReceipt signs as the new version of a sign key would: every key of an
// algorithm in a World is the same.
func (w *World) signReceipt(alg kms.Algorithm, message []byte) []byte {
	w.t.Helper()
	curve, sum := elliptic.P256(), sha256.Sum256(message)
	digest := sum[:]
	if alg == kms.ECDSAP384 {
		sum := sha512.Sum384(message)
		curve, digest = elliptic.P384(), sum[:]
	}
	size := (curve.Params().BitSize + 7) / 8
	key, err := ecdsa.ParseRawPrivateKey(curve, keyScalar(size))
	if err != nil {
		w.t.Fatal(err)
	}
	r, s, err := ecdsa.Sign(rand.Reader, key, digest)
	if err != nil {
		w.t.Fatal(err)
	}
	return append(r.FillBytes(make([]byte, size)), s.FillBytes(make([]byte, size))...)
}

// keyScalar is the private half of PublicKey.
func keyScalar(size int) []byte {
	scalar := make([]byte, size)
	scalar[size-1] = 5
	return scalar
}
