package sim

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
)

// entry is what the first node to apply a log entry made of it.
type entry struct {
	sum   [32]byte
	kind  kms.Kind
	leaf  []byte
	clock int64
}

// said is a custodian's verdict on a proposal.
type said struct {
	proposal, custodian string
	verdict             approval.Verdict
}

// watch knows who has truly signed what, sees every entry that any node applies, and
// holds the one against the other. It shares no rule with the state machine.
type watch struct {
	mu       sync.Mutex
	failures []string
	leaders  map[uint64]string   // by term
	log      map[uint64]entry    // by index
	last     uint64              // highest index
	clocks   map[*life]int64     // the cluster's time as each life knows it
	at       map[*life]uint64    // the index that each life has applied
	signed   map[[32]byte]bool   // commands that their origin has signed
	said     map[said]bool       // verdicts that a custodian has signed
	effects  map[[32]byte]uint64 // commands that had an effect, and where
	onces    map[string]uint64   // idempotency keys of such, and where
	votes    map[string]map[string]approval.Verdict
	actions  map[string]kms.Action // of proposals
	acked    map[uint64][32]byte   // what a client was told
	counts   map[string]int
}

func newWatch() *watch {
	return &watch{leaders: map[uint64]string{}, log: map[uint64]entry{}, clocks: map[*life]int64{}, at: map[*life]uint64{},
		signed: map[[32]byte]bool{}, said: map[said]bool{}, effects: map[[32]byte]uint64{}, onces: map[string]uint64{},
		votes: map[string]map[string]approval.Verdict{}, actions: map[string]kms.Action{}, acked: map[uint64][32]byte{}, counts: map[string]int{}}
}

func (w *watch) fail(format string, args ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.broken(format, args...)
}

// broken is fail with the lock held.
func (w *watch) broken(format string, args ...any) {
	if len(w.failures) < 10 {
		w.failures = append(w.failures, fmt.Sprintf(format, args...))
	}
}

// leads notes who sends entries as leader of a term: one at most.
func (w *watch) leads(term uint64, id string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if was, ok := w.leaders[term]; ok && was != id {
		w.broken("two leaders in term %d: %s and %s", term, was, id)
	}
	w.leaders[term] = id
}

// authored notes a command that its origin has signed, and stated a verdict that a
// custodian has.
func (w *watch) authored(raw []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.signed[sha256.Sum256(raw)] = true
}

func (w *watch) stated(s approval.Statement) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.said[said{s.Proposal, s.Custodian, s.Verdict}] = true
}

// acknowledged notes that a client was told the outcome of a command.
func (w *watch) acknowledged(raw []byte, r state.Result) {
	sum := sha256.Sum256(raw)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.counts["acknowledged"]++
	if e, ok := w.log[r.Index]; !ok || e.sum != sum || e.kind != r.Kind {
		w.broken("a client was told that its command is entry %d with outcome %v, which it is not", r.Index, r.Kind)
	}
	w.acked[r.Index] = sum
}

// promised returns the highest index that a client was told of.
func (w *watch) promised() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	var top uint64
	for i := range w.acked {
		top = max(top, i)
	}
	return top
}

// applied is called when a life has applied an entry.
func (w *watch) applied(l *life, st *state.State, raw []byte, r state.Result) {
	e := entry{sha256.Sum256(raw), r.Kind, r.Leaf, st.Clock()}
	w.mu.Lock()
	defer w.mu.Unlock()
	id := l.host.id
	if r.Index <= w.at[l] {
		w.broken("node %s applied entry %d after %d", id, r.Index, w.at[l])
	}
	w.at[l] = r.Index
	if e.clock < w.clocks[l] {
		w.broken("the cluster's time ran backwards at node %s, entry %d: from %d to %d", id, r.Index, w.clocks[l], e.clock)
	}
	w.clocks[l] = e.clock
	if was, seen := w.log[r.Index]; seen {
		if was.sum != e.sum {
			w.broken("node %s has another command as entry %d than others", id, r.Index)
		} else if was.kind != e.kind || was.clock != e.clock || !bytes.Equal(was.leaf, e.leaf) {
			w.broken("node %s made something else of entry %d than others: %v, not %v", id, r.Index, e.kind, was.kind)
		}
		return
	}
	w.log[r.Index] = e
	w.counts["entries"]++
	if now := time.Now().UnixMilli(); e.clock > now {
		w.broken("entry %d took the cluster's time to %d, ahead of the honest clocks (%d)", r.Index, e.clock, now)
	}
	if r.Index < w.last {
		w.broken("entry %d was first applied after entry %d", r.Index, w.last)
	} else if before, ok := w.log[w.last]; ok && e.clock < before.clock {
		w.broken("the cluster's time ran backwards between entries %d and %d", w.last, r.Index)
	}
	w.last = r.Index
	w.effect(st, raw, r, e)
}

// restored is called when a snapshot has replaced a life's state.
func (w *watch) restored(l *life, st *state.State) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.counts["snapshots restored"]++
	if st.Index() < w.at[l] {
		w.broken("node %s went back from entry %d to a snapshot of entry %d", l.host.id, w.at[l], st.Index())
	}
	w.at[l] = st.Index()
	if e, ok := w.log[st.Index()]; ok && e.clock != st.Clock() {
		w.broken("the snapshot of entry %d at node %s has another time", st.Index(), l.host.id)
	}
	w.clocks[l] = st.Clock()
}

// effect checks that an entry that had one was signed for.
func (w *watch) effect(st *state.State, raw []byte, r state.Result, e entry) {
	if r.Kind != 0 {
		w.counts["refused"]++
		if len(r.Events) > 0 {
			w.broken("entry %d was refused, and yet had effects", r.Index)
		}
		return
	}
	if !w.signed[e.sum] {
		w.broken("entry %d had an effect, though no node signed it", r.Index)
	}
	if r.Duplicate {
		return
	}
	if at, ok := w.effects[e.sum]; ok {
		w.broken("entry %d had an effect, as the same command had at %d", r.Index, at)
	}
	w.effects[e.sum] = r.Index
	env, cmd, err := open(raw)
	if err != nil {
		w.broken("entry %d had an effect, though it cannot be read: %v", r.Index, err)
		return
	}
	if k := string(env.Idempotency); k != "" {
		if at, ok := w.onces[k]; ok {
			w.broken("entry %d had an effect, as another with its idempotency key had at %d", r.Index, at)
		}
		w.onces[k] = r.Index
	}
	switch c := cmd.(type) {
	case *state.OpenProposal:
		p, err := approval.ParseProposal(c.Proposal)
		if err != nil {
			w.broken("entry %d opened a proposal that cannot be read", r.Index)
		}
		w.actions[approval.ProposalID(c.Proposal)] = p.Action
	case *state.CastVote:
		w.vote(r.Index, c.Statement)
	case *state.Execute:
		w.authorised(r.Index, c.Proposal)
	case *state.CommitRotation:
		w.authorised(r.Index, c.Proposal)
	}
	for _, ev := range r.Events {
		if ev.Type == state.EventProposalAuthorised {
			w.authorised(r.Index, ev.Proposal)
		}
	}
	w.counted(st, r)
}

// vote notes a vote that was taken.
func (w *watch) vote(index uint64, s approval.Statement) {
	if !w.said[said{s.Proposal, s.Custodian, s.Verdict}] {
		w.broken("entry %d took a vote that custodian %s has not given", index, s.Custodian)
		return
	}
	if w.votes[s.Proposal] == nil {
		w.votes[s.Proposal] = map[string]approval.Verdict{}
	}
	if w.votes[s.Proposal][s.Custodian] == s.Verdict {
		w.broken("entry %d took the vote of custodian %s on proposal %s a second time", index, s.Custodian, s.Proposal)
	}
	w.votes[s.Proposal][s.Custodian] = s.Verdict
	w.counts["votes"]++
}

// authorised checks that enough custodians of enough sites have signed for a proposal
// that counts as approved.
func (w *watch) authorised(index uint64, proposal string) {
	action, ok := w.actions[proposal]
	if !ok {
		w.broken("entry %d acts on proposal %s, which nobody opened", index, proposal)
		return
	}
	custodians, sites := uint32(0), map[string]bool{}
	for id, v := range w.votes[proposal] {
		if v == approval.Approve && w.said[said{proposal, id, v}] {
			custodians++
			sites[id[:strings.LastIndexByte(id, '-')]] = true
		}
	}
	c, s := need(action)
	if custodians < c || uint32(len(sites)) < s {
		w.broken("entry %d takes proposal %s (%s) for approved with %d custodians of %d sites; it takes %d of %d", index, proposal, action, custodians, len(sites), c, s)
	}
	w.counts["approved"]++
}

// counted checks that no custodian stands twice among the votes of a proposal.
func (w *watch) counted(st *state.State, r state.Result) {
	for _, ev := range r.Events {
		p, ok := st.Proposal(ev.Proposal)
		if ev.Proposal == "" || !ok {
			continue
		}
		seen := map[string]bool{}
		for _, v := range p.Votes {
			if seen[v.Statement.Custodian] {
				w.broken("after entry %d the votes of custodian %s on proposal %s count twice", r.Index, v.Statement.Custodian, p.ID)
			}
			seen[v.Statement.Custodian] = true
		}
	}
}

// open decodes a command without verifying it.
func open(raw []byte) (e state.Envelope, cmd any, err error) {
	b, _, err := state.Split(raw)
	if err != nil {
		return e, nil, err
	}
	if err := canon.Unmarshal(b, &e); err != nil {
		return e, nil, err
	}
	switch e.Type {
	case state.TypeOpenProposal:
		cmd = &state.OpenProposal{}
	case state.TypeVote:
		cmd = &state.CastVote{}
	case state.TypeExecute:
		cmd = &state.Execute{}
	case state.TypeCommitRotation:
		cmd = &state.CommitRotation{}
	default:
		return e, nil, nil
	}
	return e, cmd, canon.Unmarshal(e.Payload, cmd)
}
