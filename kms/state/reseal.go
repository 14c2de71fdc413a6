package state

import (
	"cmp"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
)

func (c Reseal) validate(e Envelope) error {
	if err := kms.CheckName("node", c.Node); err != nil {
		return err
	}
	if err := kms.CheckName("keyring", c.Keyring); err != nil {
		return err
	}
	if c.Key != "" {
		if err := kms.CheckName("key", c.Key); err != nil {
			return err
		}
	}
	switch {
	case c.Version == 0 || c.Root == 0:
		return kms.Errorf(kms.Invalid, "reseal: it needs a version, and the number of a root")
	case len(c.Sealed) == 0 || len(c.Sealed) > MaxSealed:
		return kms.Errorf(kms.Invalid, "the sealed copy for node %s has %d bytes; it must have 1 to %d", c.Node, len(c.Sealed), MaxSealed)
	case e.Principal != "":
		return kms.Errorf(kms.Invalid, "reseal: a node does it on nobody's behalf")
	}
	return noExpect(e)
}

func (Reseal) verify(*tx) error { return nil }

func (c Reseal) apply(t *tx) error {
	k, err := t.keyringFor(c.Keyring)
	if err != nil {
		return err
	}
	r := t.reader()
	next, pending := r.replacement(c.Node)
	switch {
	case !pending:
		return kms.Errorf(kms.Conflict, "the hardware root of node %s is not being replaced", c.Node)
	case next.Root != c.Root:
		return kms.Errorf(kms.Conflict, "the next root of node %s has number %d, not %d", c.Node, next.Root, c.Root)
	case c.Node == t.env.Origin && len(r.residents(k.Residency)) > 1:
		return kms.Errorf(kms.Denied, "node %s does not reseal for itself while another node is resident for keyring %s", c.Node, k.Name)
	case r.refusedFrom(next, c.pending(), t.env.Origin):
		return kms.Errorf(kms.Denied, "the next root of node %s has refused a copy that node %s sealed; another node has to", c.Node, t.env.Origin)
	}
	if c.Key == "" {
		err = c.applyKEK(t)
	} else {
		err = c.applyVersion(t)
	}
	if err != nil {
		return err
	}
	insert(t.Txn, tableResealed, resealed{
		Node: c.Node, Root: c.Root, Keyring: c.Keyring, Key: c.Key, Version: c.Version,
		Origin: t.env.Origin, Time: t.clock, Index: t.index, Statement: t.raw,
	})
	t.event(Event{Type: EventResealed, Keyring: c.Keyring, Key: c.Key, Version: c.Version, Node: c.Node})
	return nil
}

func (c Reseal) pending() Pending { return Pending{c.Keyring, c.Key, c.Version} }

func (c Reseal) applyKEK(t *tx) error {
	kek, ok := find[KEK](t.Txn, tableKEK, byID, numberKey(uint64(c.Version), c.Keyring))
	if !ok {
		return kms.Errorf(kms.NotFound, "keyring %s has no KEK version %d", c.Keyring, c.Version)
	}
	var err error
	if kek.Copies, err = c.add(t, kek.Copies); err != nil {
		return err
	}
	insert(t.Txn, tableKEK, kek)
	return nil
}

func (c Reseal) applyVersion(t *tx) error {
	v, ok := t.reader().version(c.Keyring, c.Key, c.Version)
	path := kms.KeyPath(c.Keyring, c.Key)
	switch {
	case !ok:
		return kms.Errorf(kms.NotFound, "there is no version %d of key %s", c.Version, path)
	case v.Generated == "":
		return kms.Errorf(kms.Invalid, "version %d of key %s is wrapped under the KEK; there is nothing to reseal", c.Version, path)
	case v.State.Gone():
		return kms.Errorf(kms.Conflict, "version %d of key %s is destroyed", c.Version, path)
	}
	var err error
	if v.Copies, err = c.add(t, v.Copies); err != nil {
		return err
	}
	insert(t.Txn, tableVersion, v)
	return nil
}

// add returns the copies with the new one. When a stored statement is replayed,
// the copy for the present root may be missing: it can have come with a statement
// that went with it.
func (c Reseal) add(t *tx, copies []SealedCopy) ([]SealedCopy, error) {
	n, _ := t.reader().node(c.Node)
	at, exists := slices.BinarySearchFunc(copies, SealedCopy{Node: c.Node, Root: c.Root}, compareCopies)
	switch {
	case exists:
		return nil, kms.Errorf(kms.Exists, "node %s has a copy for its root number %d", c.Node, c.Root)
	case n.Root == 0:
		k, _ := t.reader().keyring(c.Keyring)
		if !slices.Contains(k.Residency, n.Site) {
			return nil, kms.Errorf(kms.NotResident, "node %s is at site %s, where keyring %s is not resident", n.ID, n.Site, k.Name)
		}
	case !t.replay && !hasCopy(copies, c.Node, n.Root):
		return nil, kms.Errorf(kms.NotResident, "node %s has no copy for its present root", c.Node)
	}
	return slices.Insert(slices.Clone(copies), at, SealedCopy{Node: c.Node, Root: c.Root, Sealed: c.Sealed}), nil
}

func compareCopies(a, b SealedCopy) int {
	return cmp.Or(strings.Compare(a.Node, b.Node), cmp.Compare(a.Root, b.Root))
}

func hasCopy(copies []SealedCopy, node string, root uint32) bool {
	_, ok := slices.BinarySearchFunc(copies, SealedCopy{Node: node, Root: root}, compareCopies)
	return ok
}

// dropCopies removes the copies for one of a node's roots, with the statements
// that brought them and those that refused some.
func (t *tx) dropCopies(node string, root uint32) {
	drop := func(copies []SealedCopy) []SealedCopy {
		return slices.DeleteFunc(slices.Clone(copies), func(c SealedCopy) bool { return c.Node == node && c.Root == root })
	}
	for _, k := range list[KEK](t.Txn, tableKEK, byCopy, copyKey(node, root)) {
		k.Copies = drop(k.Copies)
		insert(t.Txn, tableKEK, k)
	}
	for _, v := range list[Version](t.Txn, tableVersion, byCopy, copyKey(node, root)) {
		v.Copies = drop(v.Copies)
		insert(t.Txn, tableVersion, v)
	}
	for _, s := range list[resealed](t.Txn, tableResealed, byNode, prefixKey(node)) {
		if s.Root == root {
			mustDB(t.Delete(tableResealed, &s))
		}
	}
	for _, x := range t.reader().refusals(node, root) {
		mustDB(t.Delete(tableRefused, &x))
	}
}
