package state

import (
	"bytes"
	"errors"
	"math"
	"slices"

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

// signers are the keys that signed for each node, by what the snapshot says, the first one
// first. They are not believed: a wrong one costs a verification more.
type signers map[string][]signingKey

type signingKey struct {
	until   uint64 // index in the log from which on it is another one
	suite   uint16
	signing []byte
}

func (s *State) signers() signers {
	m, r := signers{}, s.reader()
	add := func(node string, until uint64, suite uint16, signing []byte) {
		m[node] = append(m[node], signingKey{until, suite, signing})
	}
	nodes := r.nodes()
	for _, old := range r.removals() {
		nodes = append(nodes, old.Node)
	}
	for _, n := range nodes {
		for _, f := range r.formers(n.ID) {
			add(n.ID, f.Until, f.SigningSuite, f.Signing)
		}
		add(n.ID, math.MaxUint64, n.SigningSuite, n.Signing)
	}
	return m
}

// open opens statements and verifies their signatures by the keys that are likely to be the
// right ones. The slice into is used again.
func (k signers) open(into []opened, log []statement, spread Spread) []opened {
	into = append(into[:0], make([]opened, len(log))...)
	spread(len(log), func(i int) {
		st := log[i]
		if st.op != nil {
			return
		}
		o := open(st.raw)
		at := slices.IndexFunc(k[o.env.Origin], func(x signingKey) bool { return st.index < x.until })
		if o.broken == nil && at >= 0 {
			x := k[o.env.Origin][at]
			if verifyBy(x.suite, x.signing, o.envelope, CommandContext, o.signature) == nil {
				o.suite, o.signing = x.suite, x.signing
			}
		}
		into[i] = o
	})
	return into
}
