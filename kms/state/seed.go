package state

import (
	"bytes"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/pqc"
)

// TypeKeepSeed is the type of KeepSeed.
const TypeKeepSeed Type = 21

// MaxSeed is the longest wrapped seed in bytes.
const MaxSeed = 4 << 10

// KeepSeed keeps the post-quantum half of the origin node's hardware root in the
// state: the ML-KEM seed as the node's own device has wrapped it, which no other
// device opens. A backup then holds all that is needed to set the node up again with
// the same device.
type KeepSeed struct {
	Root    uint32 `cbor:"root"`    // number of the node's present root
	Suite   uint16 `cbor:"suite"`   // pqc KEM suite
	Wrapped []byte `cbor:"wrapped"` // by the device's wrapping key
}

// Type implements Command.
func (KeepSeed) Type() Type { return TypeKeepSeed }

// Seed is what a node has kept with KeepSeed.
type Seed struct {
	Node      string `cbor:"node"`
	Root      uint32 `cbor:"root"`
	Suite     uint16 `cbor:"suite"`
	Wrapped   []byte `cbor:"wrapped"`
	Time      int64  `cbor:"time"`  // cluster clock
	Index     uint64 `cbor:"index"` // of Statement in the log
	Statement []byte `cbor:"statement"`
}

func seedID(r *Seed) []byte { return nameKey(r.Node) }

func (c KeepSeed) validate(e Envelope) error {
	switch {
	case c.Root == 0:
		return kms.Errorf(kms.Invalid, "seed: it does not say of which root")
	case len(c.Wrapped) == 0 || len(c.Wrapped) > MaxSeed:
		return kms.Errorf(kms.Invalid, "seed: it has %d bytes; it must have 1 to %d", len(c.Wrapped), MaxSeed)
	case e.Principal != "":
		return kms.Errorf(kms.Invalid, "seed: a node does it on nobody's behalf")
	}
	if s, ok := pqc.Lookup(pqc.SuiteID(c.Suite)); !ok || s.Kind != pqc.KEM {
		return kms.Errorf(kms.Invalid, "seed: %v is no KEM suite", pqc.SuiteID(c.Suite))
	}
	return noExpect(e)
}

func (KeepSeed) verify(*tx) error { return nil }

func (c KeepSeed) apply(t *tx) error {
	n, _ := t.reader().node(t.env.Origin)
	if n.Root != c.Root || n.Suite != c.Suite {
		return kms.Errorf(kms.Conflict, "node %s has root number %d of suite %v now", n.ID, n.Root, pqc.SuiteID(n.Suite))
	}
	old, kept := find[Seed](t.Txn, tableSeed, byID, nameKey(n.ID))
	if kept && old.Root == c.Root && bytes.Equal(old.Wrapped, c.Wrapped) {
		return kms.Errorf(kms.Exists, "the seed of node %s is kept already", n.ID)
	}
	insert(t.Txn, tableSeed, Seed{Node: n.ID, Root: c.Root, Suite: c.Suite, Wrapped: c.Wrapped, Time: t.clock, Index: t.index, Statement: t.raw})
	return nil
}

// dropSeed forgets the seed of a root that its node has no more.
func (t *tx) dropSeed(node string) {
	if old, kept := find[Seed](t.Txn, tableSeed, byID, nameKey(node)); kept {
		mustDB(t.Delete(tableSeed, &old))
	}
}

// Seed returns what a node has kept of its present root.
func (s *State) Seed(node string) (Seed, bool) {
	return find[Seed](s.read(), tableSeed, byID, nameKey(node))
}
