package sim

import (
	"bytes"
	"time"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// forge has the leader put entries into the log that it must not: the network carries
// them, Raft commits them, and every machine must refuse them.
func (s *schedule) forge() {
	l := s.leader()
	if l == nil {
		return
	}
	h := l.host
	s.count("hostile leaders")
	s.note("leader %s is hostile", h.id)
	s.world.SetState(l.node.State())
	for range 1 + s.rand.IntN(4) {
		forged := s.forgery(l)
		if forged == nil {
			continue
		}
		carrier := s.sign(h, state.Tick{})
		h.set(func(h *host) {
			h.hostile, h.lied = true, true
			h.swaps[string(carrier)] = forged
		})
		s.propose(l, carrier, nil)
	}
}

// forgery returns an entry that a hostile leader might like.
func (s *schedule) forgery(l *life) []byte {
	h, st := l.host, l.node.State()
	other := h
	for other == h {
		other = s.host()
	}
	switch s.rand.IntN(8) {
	case 0: // another node's clock, far ahead
		return s.counterfeit(h, other, state.Tick{}, statetest.At(time.Now().Add(time.Hour).UnixMilli()))
	case 1: // its own clock, back
		return s.signAt(h, state.Tick{}, st.Clock()-s.span().Milliseconds())
	case 2: // a replay
		return s.replay(l)
	case 3: // a changed byte
		raw := bytes.Clone(s.sign(h, state.Tick{}))
		raw[s.rand.IntN(len(raw))] ^= 1 << s.rand.IntN(8)
		return raw
	}
	open := st.ProposalsOpen()
	if len(open) == 0 {
		return s.counterfeit(h, other, state.Tick{}, statetest.At(time.Now().Add(time.Minute).UnixMilli()))
	}
	p := pick(s.rand, open)
	switch s.rand.IntN(4) {
	case 0: // a custodian's vote, signed by another
		all := st.Custodians()
		at := s.rand.IntN(len(all))
		v := s.world.Statement(p.ID, all[at].ID, approval.Approve)
		v.Custodian = all[(at+1)%len(all)].ID
		v.Credential = statetest.Record(v.Custodian, "", 0, s.world.Custodian(v.Custodian)).Credentials[0].ID
		return s.sign(h, state.CastVote{Statement: v})
	case 1: // a vote that was given, again
		if len(p.Votes) > 0 {
			return s.sign(h, state.CastVote{Statement: pick(s.rand, p.Votes).Statement})
		}
	case 2: // an act in another node's name
		return s.counterfeit(h, other, s.world.CommitCommand(p.ID), statetest.Expect(p.Content.Revision))
	}
	// an act that is not approved
	if p.Content.Action == kms.ActionRotate {
		return s.sign(h, s.world.CommitCommand(p.ID), statetest.Expect(p.Content.Revision))
	}
	return s.sign(h, state.Execute{Proposal: p.ID}, statetest.Expect(p.Content.Revision))
}

// counterfeit returns a command in another node's name, signed by the host.
func (s *schedule) counterfeit(h, other *host, cmd state.Command, opts ...statetest.Option) []byte {
	return s.seal(h, s.world.Envelope(other.id, cmd, append([]statetest.Option{statetest.At(h.now())}, opts...)...))
}

// replay returns a command that has been in the log.
func (s *schedule) replay(l *life) []byte {
	l.disk.mu.Lock()
	defer l.disk.mu.Unlock()
	var past [][]byte
	for _, e := range l.disk.now.log {
		if e.Type == raft.LogCommand {
			past = append(past, e.Data)
		}
	}
	if len(past) == 0 {
		return nil
	}
	return pick(s.rand, past)
}
