package engine

import (
	"time"

	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// What a node serves of a keyring, in wire.Staleness.
const (
	servesAll     = "everything"
	servesDecrypt = "decrypt"
	servesNothing = "nothing"
)

// staleness tells of each keyring that the caller may read what this node serves of
// it now.
func (e *Engine) staleness(st *state.State, c Caller) []wire.Staleness {
	age := e.cluster.Fresh()
	all := e.access.allow(st, c.Identity, ActReadKeyring, resource{}) == nil
	var l []wire.Staleness
	for _, kr := range st.Keyrings() {
		if !all && e.access.allow(st, c.Identity, ActReadKeyring, ofRing(kr.Name).at(st)) != nil {
			continue
		}
		s := wire.Staleness{Keyring: kr.Name, Resident: st.Resident(kr.Name, e.node), MaxStalenessMS: kr.MaxStaleness, Survive: kr.Survive}
		switch {
		case !s.Resident:
			s.Serves = servesNothing
		case age <= time.Duration(kr.MaxStaleness)*time.Millisecond:
			s.Serves = servesAll
		case kr.Survive && age < neverFresh:
			s.Serves = servesDecrypt
		default:
			s.Serves = servesNothing
		}
		l = append(l, s)
	}
	return l
}
