package state

import (
	"bytes"
	"errors"

	"github.com/conclave-kms/conclave/kms"
)

// Spread does f(0) to f(n-1), several at once where it can, and returns when all have
// ended. This package starts no goroutine itself: its caller may.
type Spread func(n int, f func(i int))

func inOrder(n int, f func(i int)) {
	for i := range n {
		f(i)
	}
}

// aheadOf is how many stored statements are opened at once. It bounds what is held of
// them beside the states.
const aheadOf = 1024

// opened is a stored command taken apart: all that can be done before its turn comes.
type opened struct {
	envelope, signature []byte
	env                 Envelope
	op                  operation
	broken              error // why it is no signed envelope; nothing else is set then
	unfit               error // why its payload is no command

	// The key under which the signature was verified, nil for none. Whether it is the
	// key that had to sign is known when the statement's turn comes.
	suite   uint16
	signing []byte
}

// by reports whether the signature was verified under a key.
func (o *opened) by(suite uint16, signing []byte) bool {
	return len(o.signing) > 0 && o.suite == suite && bytes.Equal(o.signing, signing)
}

// open takes a signed command apart and verifies no signature.
func open(raw []byte) (o opened) {
	if o.envelope, o.signature, o.broken = Split(raw); o.broken != nil {
		return o
	}
	if o.env, o.broken = parseEnvelope(o.envelope); o.broken != nil {
		return o
	}
	o.op, o.unfit = parseCommand(o.env)
	if errors.Is(o.unfit, ErrUnknownCommand) {
		o.unfit = kms.Wrap(kms.Invalid, o.unfit, "its type or version is not known here", "use a newer version of the program")
	}
	return o
}

// openAhead opens statements and verifies their signatures by the keys that are likely to
// be the right ones. The slice into is used again.
func (s *State) openAhead(into []opened, log []statement, spread Spread) []opened {
	into = append(into[:0], make([]opened, len(log))...)
	spread(len(log), func(i int) {
		st := log[i]
		if st.op != nil {
			return
		}
		o := open(st.raw)
		if o.broken == nil {
			suite, signing := s.likelySigner(o.env, st.index)
			if verifyBy(suite, signing, o.envelope, CommandContext, o.signature) == nil {
				o.suite, o.signing = suite, signing
			}
		}
		into[i] = o
	})
	return into
}

// likelySigner returns the key that signed for a node at a place in the log, by what the
// snapshot says. It is not believed: a wrong one costs a verification more.
func (s *State) likelySigner(e Envelope, index uint64) (suite uint16, signing []byte) {
	for _, f := range s.FormerRoots(e.Origin) { // the first one first
		if index < f.Until {
			return f.SigningSuite, f.Signing
		}
	}
	if n, ok := s.Node(e.Origin); ok {
		return n.SigningSuite, n.Signing
	}
	old, _ := s.Removal(e.Origin)
	return old.Node.SigningSuite, old.Node.Signing
}
