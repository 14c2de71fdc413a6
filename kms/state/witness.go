package state

import (
	"bytes"
	"encoding/binary"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/note"
	"github.com/conclave-kms/conclave/pqc"
)

// TypeRegisterWitness is the type of RegisterWitness.
const TypeRegisterWitness Type = 38

// MaxWitnessKeys is how many ML-DSA-44 keys a node may register, one after another.
const MaxWitnessKeys = 32

// WitnessContext is the signature context of a witness key's proof of possession.
const WitnessContext = "conclave/witness/v1"

// EventWitnessRegistered says that Node has a key for checkpoints.
const EventWitnessRegistered = "witness-registered"

// RegisterWitness gives the origin node the ML-DSA-44 key by which, beside its hardware
// key, it signs checkpoints. The envelope's signature by the hardware key is what
// binds the key to the node. It stays when the node's hardware root is replaced; one
// that was lost with its device is followed by another.
type RegisterWitness struct {
	Number     uint32 `cbor:"number"`     // of the key at this node, from 1
	PublicKey  []byte `cbor:"public-key"` // ML-DSA-44
	Possession []byte `cbor:"possession"` // by the key itself over WitnessMessage
}

// Type implements Command.
func (RegisterWitness) Type() Type { return TypeRegisterWitness }

// WitnessMessage is what a witness key signs, under WitnessContext, to show that who
// registers it holds it: cluster ‖ 0 ‖ node ‖ 0 ‖ number (4 bytes, big endian) ‖ public key.
func WitnessMessage(cluster, node string, number uint32, public []byte) []byte {
	b := binary.BigEndian.AppendUint32(prefixKey(cluster, node), number)
	return append(b, public...)
}

// Witness is a key that a node has registered for checkpoints. All of them stay, so
// that what they signed can be verified.
type Witness struct {
	Node      string `cbor:"node"`
	Number    uint32 `cbor:"number"`
	PublicKey []byte `cbor:"public-key"`
	Time      int64  `cbor:"time"`  // cluster clock
	Index     uint64 `cbor:"index"` // of Statement in the log
	Statement []byte `cbor:"statement"`
}

func witnessID(r *Witness) []byte { return numberKey(uint64(r.Number), r.Node) }

func (c RegisterWitness) validate(e Envelope) error {
	switch {
	case c.Number == 0 || c.Number > MaxWitnessKeys:
		return kms.Errorf(kms.Invalid, "witness: the number of the key must be 1 to %d", MaxWitnessKeys)
	case len(c.PublicKey) != pqc.MLDSA44PublicKeySize || len(c.Possession) != pqc.MLDSA44SignatureSize:
		return kms.Errorf(kms.Invalid, "witness: the key or its signature has no length of ML-DSA-44")
	case e.Principal != "":
		return kms.Errorf(kms.Invalid, "witness: a node does it on nobody's behalf")
	}
	return noExpect(e)
}

func (c RegisterWitness) verify(t *tx) error {
	m := WitnessMessage(t.before.cluster, t.env.Origin, c.Number, c.PublicKey)
	if err := pqc.VerifyMLDSA44(c.PublicKey, m, []byte(WitnessContext), c.Possession); err != nil {
		return kms.Wrap(kms.BadSignature, err, "witness: the key's own signature does not verify", "")
	}
	return nil
}

func (c RegisterWitness) apply(t *tx) error {
	old, _ := t.reader().witness(t.env.Origin)
	switch {
	case bytes.Equal(old.PublicKey, c.PublicKey):
		return kms.Errorf(kms.Exists, "node %s has registered this key already", t.env.Origin)
	case old.Number+1 != c.Number:
		return kms.Errorf(kms.Conflict, "the next key of node %s for checkpoints has number %d", t.env.Origin, old.Number+1)
	}
	insert(t.Txn, tableWitness, Witness{Node: t.env.Origin, Number: c.Number, PublicKey: c.PublicKey, Time: t.clock, Index: t.index, Statement: t.raw})
	t.event(Event{Type: EventWitnessRegistered, Node: t.env.Origin, Version: c.Number})
	return nil
}

// witness returns the key that a node has registered last.
func (r reader) witness(node string) (w Witness, ok bool) {
	for _, w = range list[Witness](r.x, tableWitness, byID, prefixKey(node)) {
		ok = true
	}
	return w, ok
}

// Witness returns the key for checkpoints that a node has registered last.
func (s *State) Witness(node string) (Witness, bool) { return s.reader().witness(node) }

// noteWitness returns the pair of keys by which a node signs checkpoints now.
func (t *tx) noteWitness(node string) (note.Witness, error) {
	r := t.reader()
	n, _ := r.node(node)
	w, ok := r.witness(node)
	if !ok {
		return note.Witness{}, kms.Errorf(kms.Conflict, "node %s has registered no key for checkpoints", node)
	}
	return n.noteWitness(t.before.cluster, w), nil
}

func (n Node) noteWitness(cluster string, w Witness) note.Witness {
	return note.Witness{Name: note.KeyName(cluster, n.ID), SigningSuite: pqc.SuiteID(n.SigningSuite), Signing: n.Signing, MLDSA: w.PublicKey}
}

// NoteWitness returns the pair of keys that a node had for checkpoints at an index of the
// log, also of a node that was removed.
func (s *State) NoteWitness(node string, index uint64) (note.Witness, bool) {
	r := s.reader()
	n, ok := r.known(node)
	for _, f := range r.formers(node) {
		if index < f.Until {
			n.SigningSuite, n.Signing = f.SigningSuite, f.Signing
			break
		}
	}
	var w Witness
	for _, x := range list[Witness](r.x, tableWitness, byID, prefixKey(node)) {
		if x.Index <= index {
			w = x
		}
	}
	return n.noteWitness(s.cluster, w), ok && w.Number > 0
}
