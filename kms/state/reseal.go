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
	case c.Version == 0 || c.Root < 2:
		return kms.Errorf(kms.Invalid, "reseal: it needs a version, and the number of a root after the first")
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
		Time: t.clock, Index: t.index, Statement: t.raw,
	})
	t.event(Event{Type: EventResealed, Keyring: c.Keyring, Key: c.Key, Version: c.Version, Node: c.Node})
	return nil
}

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
// that brought them.
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
}

func (c AdoptRoot) validate(e Envelope) error {
	switch {
	case c.Root < 2:
		return kms.Errorf(kms.Invalid, "adopt: it needs the number of a root after the first")
	case e.Principal != "":
		return kms.Errorf(kms.Invalid, "adopt: a node does it on nobody's behalf")
	}
	return noExpect(e)
}

func (AdoptRoot) verify(*tx) error { return nil }

// apply makes the next root the node's own. When a stored statement is replayed,
// what was missing then cannot be told: copies that have gone since left no
// trace. The node judged it before it signed.
func (c AdoptRoot) apply(t *tx) error {
	r := t.reader()
	n, _ := r.node(t.env.Origin)
	next, pending := r.replacement(n.ID)
	switch {
	case !pending:
		return kms.Errorf(kms.Conflict, "there is no new hardware root for node %s to adopt", n.ID)
	case next.Root != c.Root:
		return kms.Errorf(kms.Conflict, "the next root of node %s has number %d, not %d", n.ID, next.Root, c.Root)
	}
	if lacks := r.wanted(n, next); !t.replay && len(lacks) > 0 {
		return kms.Errorf(kms.Conflict, "node %s has no copy for its next root of %s; resident nodes reseal them", n.ID, pendingText(lacks))
	}
	// A keyring may have come since the root was approved that it cannot serve.
	report, err := r.attestNext(n, next.New, next.Time, next.Index)
	if err != nil {
		return err
	}
	if err := r.fitForKeyrings(n, next.New, report); err != nil {
		return err
	}
	t.dropCopies(n.ID, n.Root)
	insert(t.Txn, tableFormer, FormerRoot{
		Node: n.ID, Root: n.Root, SigningSuite: n.SigningSuite, Signing: n.Signing,
		Proposal: next.Proposal, Time: t.clock, Until: t.index, Statement: t.raw,
	})
	mustDB(t.Delete(tableNext, &next))
	n = n.with(next.Root, next.New)
	insert(t.Txn, tableNode, n)
	t.voidTarget(nodeTarget(n))
	t.attested = &attestedRoot{n.ID, report}
	t.event(Event{Type: EventNodeReplaced, Node: n.ID, Proposal: next.Proposal})
	return nil
}

// wanted lists what keeps a node from its next root because it has no copy for it.
// Where the custodians let it leave things behind, that is only the KEKs that
// another node can still reseal: key versions may be beyond every other device,
// and a keyring at this node alone may be lost with its device.
func (r reader) wanted(n Node, next Replacement) []Pending {
	return slices.DeleteFunc(r.unsealed(n, next), func(p Pending) bool {
		k, _ := r.keyring(p.Keyring)
		return next.Leave && (p.Key != "" || len(r.residents(k.Residency)) == 1)
	})
}

// pendingText names up to three versions.
func pendingText(l []Pending) string {
	var names []string
	for _, p := range l[:min(3, len(l))] {
		name := "KEK of keyring " + p.Keyring
		if p.Key != "" {
			name = "key " + kms.KeyPath(p.Keyring, p.Key)
		}
		names = append(names, name+" version "+decimal(uint64(p.Version)))
	}
	text := strings.Join(names, ", ")
	if n := len(l) - len(names); n > 0 {
		text += " and " + decimal(uint64(n)) + " more"
	}
	return text
}

// unsealed lists what a node has a copy of for its present root and none for the
// next one: KEKs first.
func (r reader) unsealed(n Node, next Replacement) (l []Pending) {
	for _, k := range list[KEK](r.x, tableKEK, byCopy, copyKey(n.ID, n.Root)) {
		if !hasCopy(k.Copies, n.ID, next.Root) {
			l = append(l, Pending{Keyring: k.Keyring, Version: k.Version})
		}
	}
	for _, v := range list[Version](r.x, tableVersion, byCopy, copyKey(n.ID, n.Root)) {
		if !hasCopy(v.Copies, n.ID, next.Root) {
			l = append(l, Pending{Keyring: v.Keyring, Key: v.Key, Version: v.Version})
		}
	}
	return l
}

// Unsealed returns the versions of which the node has a copy for its present root
// and none for its next one, KEKs first: what resident nodes have to reseal before
// it can adopt that root. It is empty while no root is pending.
func (s *State) Unsealed(node string) []Pending {
	r := s.reader()
	n, _ := r.node(node)
	next, pending := r.replacement(node)
	if !pending {
		return nil
	}
	return r.unsealed(n, next)
}
