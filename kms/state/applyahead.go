package state

import (
	"bytes"

	"github.com/conclave-kms/conclave/kms/note"
)

// Ahead is a command of which signatures were verified before its turn. Whether the keys
// are those that had to sign is decided when it is applied.
type Ahead struct {
	Raw []byte

	suite    uint16 // of the key that verifies the envelope, none: signing is empty
	signing  []byte
	head     *note.Checkpoint // that the witness has signed
	witness  note.Witness
	verified bool // of head
}

// Ahead verifies what it can of a signed command under the keys of this state, which is at
// most some commands before its turn. It changes nothing and may be called for several
// commands at once.
func (s *State) Ahead(raw []byte) Ahead {
	a := Ahead{Raw: raw}
	o := open(raw)
	if o.broken != nil {
		return a
	}
	suite, signing, err := s.signer(o.env)
	if err != nil || verifyBy(suite, signing, o.envelope, CommandContext, o.signature) != nil {
		return a
	}
	a.suite, a.signing = suite, signing
	head, sig, ok := s.signedHead(o)
	if !ok {
		return a
	}
	n, _ := s.Node(o.env.Origin)
	w, ok := s.reader().witness(o.env.Origin)
	if ok {
		a.head, a.witness = &head, n.noteWitness(s.cluster, w)
		a.verified = a.witness.Verify(head, sig) == nil
	}
	return a
}

// signedHead returns the head of a log that a command brings.
func (s *State) signedHead(o opened) (note.Checkpoint, note.Signature, bool) {
	switch c := o.op.(type) {
	case SubmitCheckpoint:
		return LogHead(s.Lineage(), note.AccessLog(o.env.Origin), c.Restart, c.Size, c.Root, nil), c.Signature, true
	case Cosign:
		return LogHead(s.Lineage(), c.Log, c.Restart, c.Size, c.Root, c.State), c.Signature, true
	}
	return note.Checkpoint{}, note.Signature{}, false
}

// by reports whether the envelope's signature was verified under a key.
func (a *Ahead) by(suite uint16, signing []byte) bool {
	return a != nil && len(a.signing) > 0 && a.suite == suite && bytes.Equal(a.signing, signing)
}

// verifyHead verifies the signatures of a log's head that a command brings, unless that
// was done ahead for the same head under the same keys.
func (t *tx) verifyHead(head note.Checkpoint, s note.Signature) error {
	w, err := t.noteWitness(t.env.Origin)
	if err != nil {
		return err
	}
	if a := t.ahead; a != nil && a.verified && bytes.Equal(a.head.Marshal(), head.Marshal()) && sameWitness(a.witness, w) {
		return nil
	}
	return w.Verify(head, s)
}

func sameWitness(a, b note.Witness) bool {
	return a.Name == b.Name && a.SigningSuite == b.SigningSuite && bytes.Equal(a.Signing, b.Signing) && bytes.Equal(a.MLDSA, b.MLDSA)
}

// ApplyAhead is Apply for a command that Ahead has looked at.
func (s *State) ApplyAhead(index uint64, a Ahead) (*State, Result) {
	return s.apply(index, a.Raw, &a)
}
