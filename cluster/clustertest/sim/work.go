package sim

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// ring is the keyring of every schedule, and keys are what it holds.
const ring = "coalition"

var keys = []string{"k0", "k1"}

// sign returns a command signed by a host's node, with the time of its wall clock.
func (s *schedule) sign(h *host, cmd state.Command, opts ...statetest.Option) []byte {
	return s.signAt(h, cmd, h.now(), opts...)
}

// signAt is sign with another time.
func (s *schedule) signAt(h *host, cmd state.Command, ms int64, opts ...statetest.Option) []byte {
	raw := s.seal(h, s.world.Envelope(h.id, cmd, append(opts, statetest.At(ms))...))
	s.watch.authored(raw)
	return raw
}

// seal signs an envelope with the key of a host's node, whoever it says it is from.
func (s *schedule) seal(h *host, e state.Envelope) []byte {
	e.Nonce = s.nonce()
	return h.keys.SignCommand(s.t, e.Marshal())
}

// nonce returns 16 bytes that no other call returns.
func (s *schedule) nonce() []byte {
	s.nonces++
	return binary.BigEndian.AppendUint64(make([]byte, 8), s.nonces)
}

// propose has a node propose a command, in the background.
func (s *schedule) propose(l *life, raw []byte, then func(state.Result, error)) {
	s.clients.Go(func() {
		l.host.gate(l)
		ctx, cancel := context.WithTimeout(context.Background(), s.patience)
		defer cancel()
		r, err := l.node.Propose(ctx, raw)
		l.host.gate(l)
		if l.isDead() {
			r, err = state.Result{}, kms.Errorf(kms.Unknown, "the node is gone")
		}
		if r.Index != 0 {
			s.watch.acknowledged(raw, r)
		} else if errors.Is(err, kms.Unknown) {
			s.count("unknown")
		}
		if then != nil {
			then(r, err)
		}
	})
}

// read has a node catch up, in the background, and checks that it then knows all
// that any client was told before.
func (s *schedule) read(l *life) {
	before := s.watch.promised()
	s.clients.Go(func() {
		l.host.gate(l)
		ctx, cancel := context.WithTimeout(context.Background(), s.patience)
		defer cancel()
		err := l.node.Barrier(ctx)
		at := l.node.State().Index()
		if err != nil || l.isDead() {
			return
		}
		s.count("reads")
		if at < before {
			s.watch.fail("a linearizable read at node %s saw the state at entry %d, though entry %d was acknowledged before", l.host.id, at, before)
		}
	})
}

// begin makes a keyring and keys, with no fault yet.
func (s *schedule) begin() error {
	h := s.hosts[s.ids[0]]
	do := func(cmd state.Command) error {
		raw := s.sign(h, cmd, statetest.As(s.world.Operator(h.site)))
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		r, err := h.alive().node.Propose(ctx, raw)
		if err != nil {
			return fmt.Errorf("%T: %w", cmd, err)
		}
		s.watch.acknowledged(raw, r)
		s.world.SetState(h.alive().node.State())
		return nil
	}
	s.world.SetState(h.alive().node.State())
	var sites []string
	for _, h := range s.hosts {
		sites = append(sites, h.site)
	}
	if err := do(s.world.KeyringCommand(ring, sites...)); err != nil {
		return err
	}
	for _, k := range keys {
		if err := do(s.world.KeyCommand(ring, k, kms.Encrypt)); err != nil {
			return err
		}
	}
	return nil
}

// tick has every node that is up send its time.
func (s *schedule) tick() {
	for _, id := range s.ids {
		if l := s.hosts[id].alive(); l != nil && s.rand.IntN(3) > 0 {
			s.propose(l, s.sign(l.host, state.Tick{}), nil)
		}
	}
}

// work has a client do something that makes sense in the state of a node.
func (s *schedule) work() {
	l := s.up()
	if l == nil {
		return
	}
	st := l.node.State()
	s.world.SetState(st)
	live := st.ProposalsOpen()
	switch {
	case len(live) > 0 && s.rand.IntN(8) > 0:
		s.pursue(l, pick(s.rand, live))
	case len(st.Pending(l.host.id)) > 0 && s.rand.IntN(3) > 0:
		p := st.Pending(l.host.id)[0]
		s.propose(l, s.sign(l.host, s.world.ReceiptCommand(l.host.id, p.Keyring, p.Key, p.Version)), nil)
	case s.rand.IntN(6) == 0:
		s.read(l)
	default:
		s.openProposal(l, st)
	}
}

func (s *schedule) openProposal(l *life, st *state.State) {
	k, ok := st.Key(ring, pick(s.rand, keys))
	if !ok {
		return // this node has not heard of it yet
	}
	action := kms.ActionRotate
	if k.Suspended {
		action = kms.ActionResume
	} else if s.rand.IntN(6) == 0 {
		action = kms.ActionSuspend
	}
	p := s.world.Proposal(action, approval.KeyTarget(ring, k.Name), nil)
	p.Created = st.Clock()
	p.Expires = p.Created + time.Minute.Milliseconds()
	p.Nonce = s.nonce()
	s.once(l, 3, func(h *host, opts ...statetest.Option) []byte {
		return s.sign(h, state.OpenProposal{Proposal: p.Marshal()}, append(opts, statetest.As(p.Proposer))...)
	})
}

// once proposes a request with an idempotency key, and again at another node while its
// outcome is not known.
func (s *schedule) once(l *life, tries int, request func(h *host, opts ...statetest.Option) []byte) {
	key := sha256.Sum256(s.nonce())
	opt := statetest.Idempotent(key[:], key[:])
	var try func(l *life, left int)
	try = func(l *life, left int) {
		s.propose(l, request(l.host, opt), func(_ state.Result, err error) {
			if err != nil && errors.Is(err, kms.Unknown) && left > 1 {
				s.later(10*time.Millisecond, func() {
					if other := s.up(); other != nil {
						s.count("repeated")
						try(other, left-1)
					}
				})
			}
		})
	}
	try(l, tries)
}

// pursue votes on a proposal or carries it out.
func (s *schedule) pursue(l *life, p state.Proposal) {
	if p.Progress == state.Authorised {
		if p.Content.Action != kms.ActionRotate {
			s.propose(l, s.sign(l.host, state.Execute{Proposal: p.ID}, statetest.Expect(p.Content.Revision)), nil)
			return
		}
		c := s.world.CommitCommand(p.ID)
		k, _ := l.node.State().Key(ring, c.Key)
		s.propose(l, s.sign(l.host, c, statetest.Expect(k.Revision)), nil)
		return
	}
	who := pick(s.rand, l.node.State().Custodians()).ID
	verdict := approval.Approve
	if s.rand.IntN(12) == 0 {
		verdict = approval.Reject
	}
	v := s.world.Statement(p.ID, who, verdict)
	s.watch.stated(v)
	s.propose(l, s.sign(l.host, state.CastVote{Statement: v}), nil)
	if s.rand.IntN(3) == 0 { // the same vote by another way
		if other := s.up(); other != nil {
			s.propose(other, s.sign(other.host, state.CastVote{Statement: v}), nil)
		}
	}
}
