package state

import (
	"bytes"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
)

// ConfirmRewrap says that the origin node has opened what a batch brought, and that
// it holds the same keys as what it is to take the place of.
type ConfirmRewrap struct {
	Keyring string `cbor:"keyring"`
	KEK     uint32 `cbor:"kek"`
	Batch   uint64 `cbor:"batch"`  // RewrapBatch.Index
	Digest  []byte `cbor:"digest"` // RewrapBatch.Digest
}

// RefuseRewrap says that a key version in a batch does not open at the origin node,
// or holds another key. The batch goes, and By rewraps no more for this KEK version
// while the origin is resident.
type RefuseRewrap struct {
	Keyring string `cbor:"keyring"`
	KEK     uint32 `cbor:"kek"`
	Batch   uint64 `cbor:"batch"`
	Digest  []byte `cbor:"digest"`
	By      string `cbor:"by"`      // RewrapBatch.Origin
	Key     string `cbor:"key"`     // the first entry that is not good
	Version uint32 `cbor:"version"` // of Key
}

// RefusedRewrap is a batch that a resident node refused. It stays until its KEK
// version is retired.
type RefusedRewrap struct {
	Keyring   string `cbor:"keyring"`
	KEK       uint32 `cbor:"kek"`
	Batch     uint64 `cbor:"batch"`
	Digest    []byte `cbor:"digest"`
	By        string `cbor:"by"`   // node that rewrapped
	Node      string `cbor:"node"` // that refused
	Key       string `cbor:"key"`
	Version   uint32 `cbor:"version"`
	Time      int64  `cbor:"time"`  // cluster clock
	Index     uint64 `cbor:"index"` // of Statement in the log
	Statement []byte `cbor:"statement"`
}

// Type implements Command.
func (ConfirmRewrap) Type() Type { return TypeConfirmRewrap }
func (RefuseRewrap) Type() Type  { return TypeRefuseRewrap }

// validateBatch checks what names a batch.
func validateBatch(e Envelope, keyring string, kek uint32, batch uint64, digest []byte) error {
	if err := kms.CheckName("keyring", keyring); err != nil {
		return err
	}
	switch {
	case kek < 2 || batch == 0 || len(digest) != HashSize:
		return kms.Errorf(kms.Invalid, "a batch of rewrapped key versions is named by its KEK version, log index and digest")
	case e.Principal != "":
		return kms.Errorf(kms.Invalid, "a node says on nobody's behalf what it thinks of a batch")
	}
	return noExpect(e)
}

func (c ConfirmRewrap) validate(e Envelope) error {
	return validateBatch(e, c.Keyring, c.KEK, c.Batch, c.Digest)
}

func (c RefuseRewrap) validate(e Envelope) error {
	if err := kms.CheckName("node", c.By); err != nil {
		return err
	}
	if err := kms.CheckName("key", c.Key); err != nil {
		return err
	}
	if c.Version == 0 {
		return kms.Errorf(kms.Invalid, "refusal: it needs the version of the key")
	}
	return validateBatch(e, c.Keyring, c.KEK, c.Batch, c.Digest)
}

func (ConfirmRewrap) verify(*tx) error { return nil }
func (RefuseRewrap) verify(*tx) error  { return nil }

func (c ConfirmRewrap) apply(t *tx) error {
	k, b, err := t.openBatch(c.Keyring, c.KEK, c.Batch, c.Digest)
	if err != nil {
		return err
	}
	at, exists := slices.BinarySearchFunc(b.Confirmed, t.env.Origin, func(x Confirmation, node string) int { return strings.Compare(x.Node, node) })
	if exists {
		return kms.Errorf(kms.Exists, "node %s has confirmed this batch", t.env.Origin)
	}
	b.Confirmed = slices.Insert(slices.Clone(b.Confirmed), at, Confirmation{Node: t.env.Origin, Time: t.clock, Index: t.index, Statement: t.raw})
	insert(t.Txn, tableRewrap, b)
	t.complete(k, b)
	return nil
}

// openBatch returns a batch that the origin may judge: it is to the primary KEK
// version, and in use only when all have confirmed it.
func (t *tx) openBatch(keyring string, kek uint32, index uint64, digest []byte) (Keyring, RewrapBatch, error) {
	k, err := t.keyringFor(keyring)
	if err != nil {
		return k, RewrapBatch{}, err
	}
	b, ok := t.reader().batch(keyring, kek, index)
	switch {
	case kek != k.KEK:
		return k, b, kms.Errorf(kms.Conflict, "the batch is for KEK version %d; keyring %s now uses %d", kek, k.Name, k.KEK)
	case !ok:
		return k, b, kms.Errorf(kms.NotFound, "there is no batch of rewrapped key versions %d for KEK version %d of keyring %s", index, kek, keyring)
	case b.Done:
		return k, b, kms.Errorf(kms.Exists, "the batch is confirmed by every resident node")
	case !bytes.Equal(b.Digest, digest):
		return k, b, kms.Errorf(kms.Conflict, "the batch has another digest")
	}
	return k, b, nil
}

// apply removes the batch, so that another node rewraps. When a stored statement is
// replayed the batch is not there: it went with the refusal.
func (c RefuseRewrap) apply(t *tx) error {
	if t.replay {
		if _, err := t.keyringFor(c.Keyring); err != nil {
			return err
		}
		c.record(t)
		return nil
	}
	_, b, err := t.openBatch(c.Keyring, c.KEK, c.Batch, c.Digest)
	switch {
	case err != nil:
		return err
	case b.Origin != c.By:
		return kms.Errorf(kms.Invalid, "the batch was rewrapped by node %s, not %s", b.Origin, c.By)
	case b.ConfirmedBy(t.env.Origin):
		return kms.Errorf(kms.Conflict, "node %s has confirmed this batch", t.env.Origin)
	case !slices.ContainsFunc(b.Entries, func(x RewrapEntry) bool { return x.Key == c.Key && x.Version == c.Version }):
		return kms.Errorf(kms.NotFound, "version %d of key %s is not in the batch", c.Version, kms.KeyPath(c.Keyring, c.Key))
	}
	for _, x := range b.Entries {
		if v, ok := t.reader().version(b.Keyring, x.Key, x.Version); ok && v.Next != nil && v.Next.Batch == b.Index {
			v.Next = nil
			insert(t.Txn, tableVersion, v)
		}
	}
	mustDB(t.Delete(tableRewrap, &b))
	c.record(t)
	return nil
}

func (c RefuseRewrap) record(t *tx) {
	insert(t.Txn, tableRewrapRefused, RefusedRewrap{
		Keyring: c.Keyring, KEK: c.KEK, Batch: c.Batch, Digest: c.Digest, By: c.By, Node: t.env.Origin, Key: c.Key, Version: c.Version,
		Time: t.clock, Index: t.index, Statement: t.raw,
	})
	t.event(Event{Type: EventRewrapRefused, Keyring: c.Keyring, Key: c.Key, Version: c.Version, Node: c.By})
}

// barred reports whether a resident node has refused what a node rewrapped for the
// primary KEK version, and which one.
func (r reader) barred(k Keyring, node string) (by string, barred bool) {
	nodes := r.residents(k.Residency)
	for _, x := range r.refusedRewraps(k.Name, k.KEK) {
		if x.By == node && slices.ContainsFunc(nodes, func(n Node) bool { return n.ID == x.Node }) {
			return x.Node, true
		}
	}
	return "", false
}
