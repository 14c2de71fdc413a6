package state

import (
	"bytes"
	"crypto/sha256"
	"slices"

	"github.com/conclave-kms/conclave/kms"
)

func (c RefuseCopy) validate(e Envelope) error {
	if err := kms.CheckName("keyring", c.Keyring); err != nil {
		return err
	}
	if c.Key != "" {
		if err := kms.CheckName("key", c.Key); err != nil {
			return err
		}
	}
	if err := kms.CheckName("node", c.By); err != nil {
		return err
	}
	switch {
	case c.Version == 0 || c.Root == 0:
		return kms.Errorf(kms.Invalid, "refusal: it needs a version, and the number of a root")
	case len(c.Copy) != HashSize:
		return kms.Errorf(kms.Invalid, "refusal: the hash of the copy has %d bytes, not %d", len(c.Copy), HashSize)
	case e.Principal != "":
		return kms.Errorf(kms.Invalid, "refusal: a node does it on nobody's behalf")
	}
	return noExpect(e)
}

func (RefuseCopy) verify(*tx) error { return nil }

// apply removes the copy, so that another node can seal one. When a stored statement
// is replayed the copy is not there: what brought it went with it.
func (c RefuseCopy) apply(t *tx) error {
	r := t.reader()
	n, next, err := r.pendingRoot(t.env.Origin, c.Root)
	if err != nil {
		return err
	}
	refused := RefusedCopy{
		Node: n.ID, Root: next.Root, Keyring: c.Keyring, Key: c.Key, Version: c.Version, By: c.By, Copy: c.Copy,
		Time: t.clock, Index: t.index, Statement: t.raw,
	}
	brought, ok := r.resealed(n.ID, next.Root, refused.Of())
	switch {
	case ok && brought.Origin == c.By && t.removeCopy(refused):
		mustDB(t.Delete(tableResealed, &brought))
	case t.replay:
	case !ok:
		return kms.Errorf(kms.NotFound, "node %s has no such copy for its root number %d", n.ID, next.Root)
	default:
		return kms.Errorf(kms.Conflict, "the copy for root number %d of node %s is another one now, sealed by node %s", next.Root, n.ID, brought.Origin)
	}
	insert(t.Txn, tableRefused, refused)
	t.event(Event{Type: EventCopyRefused, Keyring: c.Keyring, Key: c.Key, Version: c.Version, Node: n.ID})
	return nil
}

// removeCopy removes the very copy that was refused and reports whether it was there.
func (t *tx) removeCopy(x RefusedCopy) bool {
	is := func(c SealedCopy) bool { return x.is(c) }
	if x.Key == "" {
		k, ok := find[KEK](t.Txn, tableKEK, byID, numberKey(uint64(x.Version), x.Keyring))
		if !ok || !slices.ContainsFunc(k.Copies, is) {
			return false
		}
		k.Copies = slices.DeleteFunc(slices.Clone(k.Copies), is)
		insert(t.Txn, tableKEK, k)
		return true
	}
	v, ok := t.reader().version(x.Keyring, x.Key, x.Version)
	if !ok || !slices.ContainsFunc(v.Copies, is) {
		return false
	}
	v.Copies = slices.DeleteFunc(slices.Clone(v.Copies), is)
	insert(t.Txn, tableVersion, v)
	return true
}

// resealed returns the statement behind a copy.
func (r reader) resealed(node string, root uint32, p Pending) (resealed, bool) {
	return find[resealed](r.x, tableResealed, byID, resealedID(&resealed{Node: node, Root: root, Keyring: p.Keyring, Key: p.Key, Version: p.Version}))
}

// ResealedBy returns the node that sealed the copy of a version to a node's root, if
// it came with a Reseal.
func (s *State) ResealedBy(node string, root uint32, p Pending) (string, bool) {
	x, ok := s.reader().resealed(node, root, p)
	return x.Origin, ok
}

// is reports whether a copy of the version is the one that was refused.
func (x RefusedCopy) is(c SealedCopy) bool {
	sum := sha256.Sum256(c.Sealed)
	return c.Node == x.Node && c.Root == x.Root && bytes.Equal(sum[:], x.Copy)
}

// Of names the version whose copy was refused.
func (x RefusedCopy) Of() Pending { return Pending{x.Keyring, x.Key, x.Version} }

// refusals returns what one of a node's roots has refused.
func (r reader) refusals(node string, root uint32) []RefusedCopy {
	return list[RefusedCopy](r.x, tableRefused, byID, copyKey(node, root))
}

// refusedFrom reports whether a next root has refused the copy of a version that a
// node sealed.
func (r reader) refusedFrom(next Replacement, p Pending, by string) bool {
	return slices.ContainsFunc(r.refusals(next.Node, next.Root), func(x RefusedCopy) bool { return x.Of() == p && x.By == by })
}

// refusedCopy reports whether a copy of a version was refused.
func (r reader) refusedCopy(p Pending, c SealedCopy) bool {
	return slices.ContainsFunc(r.refusals(c.Node, c.Root), func(x RefusedCopy) bool { return x.Of() == p && x.is(c) })
}

// exhausted reports whether a next root has refused the copies of all who may seal
// a version to it: the other resident nodes, or the node itself where it is alone.
func (r reader) exhausted(k Keyring, next Replacement, p Pending) bool {
	nodes := r.residents(k.Residency)
	return !slices.ContainsFunc(nodes, func(n Node) bool {
		return (n.ID != next.Node || len(nodes) == 1) && !r.refusedFrom(next, p, n.ID)
	})
}

// Refused returns the copies that the node's next root has refused, or where none
// is pending those that its present root refused before it was adopted.
func (s *State) Refused(node string) []RefusedCopy {
	r := s.reader()
	if next, pending := r.replacement(node); pending {
		return r.refusals(node, next.Root)
	}
	n, _ := r.node(node)
	return r.refusals(node, n.Root)
}
