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

// MaxRewrap is how many key versions a Rewrap may carry.
const MaxRewrap = 256

// RewrapContext is the signature context of the manifest of a Rewrap, and
// rewrapDomain the domain string in it.
const (
	RewrapContext = "conclave/rewrap/v1"
	rewrapDomain  = "conclave/rewrap/v1"
)

// Rewrap brings key versions of protection software wrapped under the keyring's
// primary KEK version. They lie beside what is in use until every resident node has
// confirmed that they hold the same keys (ConfirmRewrap).
type Rewrap struct {
	Keyring string       `cbor:"keyring"`
	KEK     uint32       `cbor:"kek"`
	Items   []RewrapItem `cbor:"items"` // sorted by key, then version
	// Signature is the origin's over RewrapManifest. It is what stays in the state as
	// proof: the command holds wrapped material, which must go when a version is destroyed.
	Signature []byte `cbor:"signature"`
}

// RewrapItem is a key version as it is to be wrapped.
type RewrapItem struct {
	Key     string `cbor:"key"`
	Version uint32 `cbor:"version"`
	Wrapped []byte `cbor:"wrapped"`
}

// RewrapEntry names a key version and what wraps it in a batch.
type RewrapEntry struct {
	Key     string `cbor:"key"`
	Version uint32 `cbor:"version"`
	Hash    []byte `cbor:"hash"` // SHA-256 of the wrapped material
}

// RewrapManifest returns the bytes that the origin of a Rewrap signs in the context
// RewrapContext: a canonical encoding without the wrapped material itself.
func RewrapManifest(cluster, keyring, node string, kek uint32, entries []RewrapEntry) []byte {
	return canon.Marshal(struct {
		Domain  string        `cbor:"domain"`
		Cluster string        `cbor:"cluster"`
		Keyring string        `cbor:"keyring"`
		KEK     uint32        `cbor:"kek"`
		Node    string        `cbor:"node"`
		Entries []RewrapEntry `cbor:"entries"`
	}{rewrapDomain, cluster, keyring, kek, node, entries})
}

// RewrapEntries returns what the manifest says of items.
func RewrapEntries(items []RewrapItem) []RewrapEntry {
	entries := make([]RewrapEntry, len(items))
	for i, x := range items {
		sum := sha256.Sum256(x.Wrapped)
		entries[i] = RewrapEntry{x.Key, x.Version, sum[:]}
	}
	return entries
}

// RewrapBatch is what a Rewrap brought, but for the wrapped material, which is with
// the key versions. It stays until its KEK version is retired.
type RewrapBatch struct {
	Keyring   string         `cbor:"keyring"`
	KEK       uint32         `cbor:"kek"`
	Index     uint64         `cbor:"index"` // of the Rewrap in the log
	Time      int64          `cbor:"time"`  // cluster clock
	Origin    string         `cbor:"origin"`
	Entries   []RewrapEntry  `cbor:"entries"`
	Digest    []byte         `cbor:"digest"` // SHA-256 of the manifest
	Signature []byte         `cbor:"signature"`
	Confirmed []Confirmation `cbor:"confirmed"` // sorted by node
	Done      bool           `cbor:"done"`      // all resident nodes have confirmed; what it brought is in use
}

// Confirmation is a resident node's word, signed, that what a batch brought holds
// the keys that it is to hold.
type Confirmation struct {
	Node      string `cbor:"node"`
	Time      int64  `cbor:"time"`  // cluster clock
	Index     uint64 `cbor:"index"` // of Statement in the log
	Statement []byte `cbor:"statement"`
}

// Rewrapped is a key version as a batch brought it, not yet in use.
type Rewrapped struct {
	KEK     uint32 `cbor:"kek"`
	Batch   uint64 `cbor:"batch"` // RewrapBatch.Index
	Wrapped []byte `cbor:"wrapped"`
}

// Type implements Command.
func (Rewrap) Type() Type { return TypeRewrap }

func (c Rewrap) validate(e Envelope) error {
	if e.Principal != "" {
		return kms.Errorf(kms.Invalid, "rewrap: a node does it on nobody's behalf")
	}
	for _, x := range c.Items {
		if err := checkWrapped(x.Wrapped); err != nil {
			return err
		}
	}
	if err := c.batch().validate(e); err != nil {
		return err
	}
	return noExpect(e)
}

// batch is what the command comes to.
func (c Rewrap) batch() rewrapped {
	b := rewrapped{keyring: c.Keyring, kek: c.KEK, entries: RewrapEntries(c.Items), signature: c.Signature}
	for _, x := range c.Items {
		b.wrapped = append(b.wrapped, x.Wrapped)
	}
	return b
}

func (c Rewrap) verify(t *tx) error { return c.batch().verify(t) }
func (c Rewrap) apply(t *tx) error  { return c.batch().apply(t) }

// rewrapped is a Rewrap, also as it is known later: where a version has been
// rewrapped again since or destroyed, the wrapped material of an entry is nil.
type rewrapped struct {
	keyring   string
	kek       uint32
	entries   []RewrapEntry
	wrapped   [][]byte
	signature []byte
}

func (rewrapped) Type() Type { return TypeRewrap }

func (b rewrapped) validate(Envelope) error {
	if err := kms.CheckName("keyring", b.keyring); err != nil {
		return err
	}
	switch {
	case b.kek < 2:
		return kms.Errorf(kms.Invalid, "rewrap: it needs a KEK version of at least 2")
	case len(b.entries) == 0 || len(b.entries) > MaxRewrap:
		return kms.Errorf(kms.Invalid, "rewrap: it has %d key versions; it must have 1 to %d", len(b.entries), MaxRewrap)
	case len(b.signature) == 0 || len(b.signature) > MaxSignature:
		return kms.Errorf(kms.Invalid, "rewrap: the manifest has no usable signature")
	}
	for i, x := range b.entries {
		if err := kms.CheckName("key", x.Key); err != nil {
			return err
		}
		if x.Version == 0 || len(x.Hash) != HashSize {
			return kms.Errorf(kms.Invalid, "rewrap: an entry has no version or no hash")
		}
		if i > 0 && compareEntries(b.entries[i-1], x) >= 0 {
			return kms.Errorf(kms.Invalid, "rewrap: the key versions are not sorted or repeat one")
		}
	}
	return nil
}

func compareEntries(a, b RewrapEntry) int {
	return cmp.Or(strings.Compare(a.Key, b.Key), cmp.Compare(a.Version, b.Version))
}

// verify checks the origin's signature over the manifest.
func (b rewrapped) verify(t *tx) error {
	if err := b.validate(t.env); err != nil {
		return err
	}
	n, _ := t.before.Node(t.env.Origin)
	if err := verifyBy(n.SigningSuite, n.Signing, b.manifest(t), RewrapContext, b.signature); err != nil {
		return kms.Wrap(kms.BadSignature, err, "the signature of node "+n.ID+" over what it rewrapped does not verify", "")
	}
	return nil
}

func (b rewrapped) manifest(t *tx) []byte {
	return RewrapManifest(t.before.cluster, b.keyring, t.env.Origin, b.kek, b.entries)
}

func (b rewrapped) apply(t *tx) error {
	k, err := t.keyringFor(b.keyring)
	if err != nil {
		return err
	}
	r := t.reader()
	if b.kek != k.KEK {
		return kms.Errorf(kms.Conflict, "the key versions are wrapped under KEK version %d; keyring %s now uses %d", b.kek, k.Name, k.KEK)
	}
	if by, barred := r.barred(k, t.env.Origin); barred {
		return kms.Errorf(kms.Denied, "node %s has refused what node %s rewrapped for KEK version %d of keyring %s; another node has to", by, t.env.Origin, k.KEK, k.Name)
	}
	for i, x := range b.entries {
		v, err := r.toRewrap(k, x)
		if err != nil {
			return err
		}
		v.Next = &Rewrapped{KEK: b.kek, Batch: t.index, Wrapped: b.wrapped[i]}
		insert(t.Txn, tableVersion, v)
	}
	sum := sha256.Sum256(b.manifest(t))
	insert(t.Txn, tableRewrap, RewrapBatch{
		Keyring: k.Name, KEK: b.kek, Index: t.index, Time: t.clock, Origin: t.env.Origin,
		Entries: b.entries, Digest: sum[:], Signature: b.signature,
	})
	t.event(Event{Type: EventRewrapped, Keyring: k.Name, Version: b.kek, Node: t.env.Origin})
	return nil
}

// toRewrap returns the version of an entry, which must be one to rewrap.
func (r reader) toRewrap(k Keyring, x RewrapEntry) (Version, error) {
	v, ok := r.version(k.Name, x.Key, x.Version)
	path := kms.KeyPath(k.Name, x.Key)
	switch {
	case !ok:
		return v, kms.Errorf(kms.NotFound, "there is no version %d of key %s", x.Version, path)
	case v.State.Gone():
		return v, kms.Errorf(kms.Conflict, "version %d of key %s is destroyed", x.Version, path)
	case v.wrappedBy() >= k.KEK:
		return v, kms.Errorf(kms.Exists, "version %d of key %s is rewrapped under KEK version %d", x.Version, path, v.wrappedBy())
	}
	return v, nil
}

// wrappedBy is the newest KEK version that wraps the key version, in use or not.
func (v Version) wrappedBy() uint32 {
	if v.Next != nil {
		return v.Next.KEK
	}
	return v.KEK
}

// complete brings what a batch rewrapped into use when all resident nodes have
// confirmed it.
func (t *tx) complete(k Keyring, b RewrapBatch) {
	r := t.reader()
	for _, n := range r.residents(k.Residency) {
		if !b.ConfirmedBy(n.ID) {
			return
		}
	}
	for _, x := range b.Entries {
		v, ok := r.version(b.Keyring, x.Key, x.Version)
		if !ok || v.Next == nil || v.Next.Batch != b.Index {
			continue // destroyed since
		}
		if v.Made == 0 {
			v.Made = v.KEK
		}
		v.KEK, v.Wrapped, v.Next = v.Next.KEK, v.Next.Wrapped, nil
		insert(t.Txn, tableVersion, v)
	}
	b.Done = true
	insert(t.Txn, tableRewrap, b)
	t.event(Event{Type: EventRewrapConfirmed, Keyring: b.Keyring, Version: b.KEK})
}

// ConfirmedBy reports whether a node has confirmed the batch.
func (b RewrapBatch) ConfirmedBy(node string) bool {
	return slices.ContainsFunc(b.Confirmed, func(c Confirmation) bool { return c.Node == node })
}

// statement returns the batch for a replay: of the wrapped material, what is still in
// the state.
func (b RewrapBatch) statement(r reader) statement {
	op := rewrapped{keyring: b.Keyring, kek: b.KEK, entries: b.Entries, signature: b.Signature, wrapped: make([][]byte, len(b.Entries))}
	for i, x := range b.Entries {
		v, _ := r.version(b.Keyring, x.Key, x.Version)
		held := [][]byte{v.Wrapped}
		if v.Next != nil {
			held = append(held, v.Next.Wrapped)
		}
		for _, w := range held {
			if sum := sha256.Sum256(w); len(w) > 0 && bytes.Equal(sum[:], x.Hash) {
				op.wrapped[i] = w
			}
		}
	}
	return statement{index: b.Index, clock: b.Time, op: op, env: &Envelope{Origin: b.Origin}}
}
