package state

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
)

func (c AdoptRoot) validate(e Envelope) error {
	switch {
	case c.Root == 0:
		return kms.Errorf(kms.Invalid, "adopt: it needs the number of the root")
	case len(c.Copies) != HashSize:
		return kms.Errorf(kms.Invalid, "adopt: the digest of the copies has %d bytes, not %d", len(c.Copies), HashSize)
	case e.Principal != "":
		return kms.Errorf(kms.Invalid, "adopt: a node does it on nobody's behalf")
	}
	return noExpect(e)
}

func (AdoptRoot) verify(*tx) error { return nil }

// apply makes the next root the node's own. When a stored statement is replayed,
// what was missing then and which copies there were cannot be told: those that have
// gone since left no trace. The node judged it before it signed.
func (c AdoptRoot) apply(t *tx) error {
	r := t.reader()
	n, next, err := r.pendingRoot(t.env.Origin, c.Root)
	if err != nil {
		return err
	}
	if lacks := r.wanted(n, next); !t.replay && len(lacks) > 0 {
		return kms.Errorf(kms.Conflict, "node %s has no copy for its next root of %s; resident nodes reseal them", n.ID, pendingText(lacks))
	}
	if !t.replay && !bytes.Equal(c.Copies, AdoptionDigest(t.before.cluster, n.ID, next.Root, r.adoption(n, next))) {
		return kms.Errorf(kms.Conflict, "node %s has checked other copies than there are for its next root now: a version or a copy has come or gone since; it has to look again", n.ID)
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
	t.dropSeed(n.ID)
	insert(t.Txn, tableFormer, FormerRoot{
		Node: n.ID, Root: n.Root, SigningSuite: n.SigningSuite, Signing: n.Signing,
		Proposal: next.Proposal, Time: t.clock, Until: t.index, Statement: t.raw,
	})
	mustDB(t.Delete(tableNext, &next))
	first := n.Root == 0
	n = n.with(next.Root, next.New)
	insert(t.Txn, tableNode, n)
	t.voidTarget(nodeTarget(n))
	t.attested = &attestedRoot{n.ID, report}
	kind := EventNodeReplaced
	if first {
		kind = EventNodeJoined
	}
	t.event(Event{Type: kind, Node: n.ID, Proposal: next.Proposal})
	return nil
}

// pendingRoot returns a node and its next root, which must have the number.
func (r reader) pendingRoot(node string, number uint32) (Node, Replacement, error) {
	n, _ := r.node(node)
	next, pending := r.replacement(node)
	switch {
	case !pending:
		return n, next, kms.Errorf(kms.Conflict, "there is no new hardware root for node %s to adopt", n.ID)
	case next.Root != number:
		return n, next, kms.Errorf(kms.Conflict, "the next root of node %s has number %d, not %d", n.ID, next.Root, number)
	}
	return n, next, nil
}

// wanted lists what keeps a node from its next root because it has no copy for it.
// Where the custodians let it leave things behind, that is only the KEKs that
// another node can still reseal: key versions may be beyond every other device,
// a keyring at this node alone may be lost with its device, and where the next root
// has refused the copies of all others nobody is left. What a recovery ceremony can
// bring back is waited for.
func (r reader) wanted(n Node, next Replacement) []Pending {
	return slices.DeleteFunc(r.unsealed(n, next), func(p Pending) bool {
		k, _ := r.keyring(p.Keyring)
		alone := !slices.ContainsFunc(r.residents(k.Residency), func(o Node) bool { return o.ID != n.ID })
		return next.Leave && (p.Key != "" || (alone || r.exhausted(k, next, p)) && !r.recoverable(p))
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

// unsealed lists what a node has a copy of for its present root, or needs for its
// first one, and none for the next one: KEKs first.
func (r reader) unsealed(n Node, next Replacement) (l []Pending) {
	if n.Root == 0 {
		return r.unsealedJoining(n, next)
	}
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
// (before its first one: which its site may open) and none for its next one, KEKs first: what resident nodes have to reseal before
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

// AdoptedCopy is a version as a node finds it when it adopts its next root.
type AdoptedCopy struct {
	Keyring string `cbor:"keyring"`
	Key     string `cbor:"key"` // empty for the KEK
	Version uint32 `cbor:"version"`
	Copy    []byte `cbor:"copy"` // SHA-256 of the copy sealed to the next root; empty: left behind
}

// adoptionDomain begins what AdoptionDigest hashes.
const adoptionDomain = "conclave/adoption/v1"

// AdoptionDigest returns the 32-byte SHA-256 over the canonical encodings of a
// header (domain, cluster, node, number of the root, how many copies) and of the
// copies one after the other, sorted by keyring, key and version. AdoptRoot carries
// it: it binds the adoption to the very copies that the node has checked.
func AdoptionDigest(cluster, node string, root uint32, copies []AdoptedCopy) []byte {
	copies = slices.SortedFunc(slices.Values(copies), func(a, b AdoptedCopy) int {
		return cmp.Or(strings.Compare(a.Keyring, b.Keyring), strings.Compare(a.Key, b.Key), cmp.Compare(a.Version, b.Version))
	})
	h := sha256.New()
	h.Write(canon.Marshal(struct {
		Domain  string `cbor:"domain"`
		Cluster string `cbor:"cluster"`
		Node    string `cbor:"node"`
		Root    uint32 `cbor:"root"`
		Copies  uint64 `cbor:"copies"`
	}{adoptionDomain, cluster, node, root, uint64(len(copies))}))
	for _, c := range copies {
		h.Write(canon.Marshal(c))
	}
	return h.Sum(nil)
}

// Adoption returns what the node would adopt its next root with, as AdoptionDigest
// takes it: the copies for that root, and the versions that have none. It is empty
// while no root is pending.
func (s *State) Adoption(node string) []AdoptedCopy {
	r := s.reader()
	n, _ := r.node(node)
	next, pending := r.replacement(node)
	if !pending {
		return nil
	}
	return r.adoption(n, next)
}

func (r reader) adoption(n Node, next Replacement) (l []AdoptedCopy) {
	add := func(keyring, key string, version uint32, copies []SealedCopy) {
		l = append(l, AdoptedCopy{keyring, key, version, copyHash(copies, n.ID, next.Root)})
	}
	for _, k := range list[KEK](r.x, tableKEK, byCopy, copyKey(n.ID, next.Root)) {
		add(k.Keyring, "", k.Version, k.Copies)
	}
	for _, v := range list[Version](r.x, tableVersion, byCopy, copyKey(n.ID, next.Root)) {
		add(v.Keyring, v.Key, v.Version, v.Copies)
	}
	for _, p := range r.unsealed(n, next) {
		add(p.Keyring, p.Key, p.Version, nil)
	}
	return l
}

// copyHash returns the SHA-256 of the copy for a root, nothing where there is none.
func copyHash(copies []SealedCopy, node string, root uint32) []byte {
	at, ok := slices.BinarySearchFunc(copies, SealedCopy{Node: node, Root: root}, compareCopies)
	if !ok {
		return []byte{}
	}
	sum := sha256.Sum256(copies[at].Sealed)
	return sum[:]
}
