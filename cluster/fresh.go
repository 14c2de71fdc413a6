package cluster

import (
	"context"
	"errors"
	"math"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// A proof says: at the time At the cluster had committed no command beyond
// Index. It counts for a node once the node has applied Index. The leader proves
// its leadership with a quorum in proveLoop; the others ask the leader for
// its last proof. Times are of the clock of the node that keeps the proof, and err
// on the side of older.
type proof struct {
	index uint64
	at    time.Time
}

// maxPending bounds the proofs that wait for the log to catch up.
const maxPending = 64

// proofs keeps what a node knows about its own freshness.
type proofs struct {
	mu      sync.Mutex
	fresh   time.Time // of the latest proof that counts
	newest  time.Time // of the latest of all
	pending []proof   // that do not count yet, oldest first

	led     proof // the latest made as leader
	ledTerm uint64
}

// note adds a proof.
func (p *proofs) note(index uint64, at time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if at.After(p.newest) {
		p.newest = at
	}
	if len(p.pending) == maxPending {
		p.pending = p.pending[:maxPending-1]
	}
	p.pending = append(p.pending, proof{index, at})
}

// age returns how long ago the latest proof was made, whether it counts or not;
// negative for never.
func (p *proofs) age() time.Duration {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.newest.IsZero() {
		return -time.Millisecond
	}
	return since(p.newest)
}

// latest returns the time of the latest proof that counts at an applied index.
func (p *proofs) latest(applied uint64) time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	rest := p.pending[:0]
	for _, q := range p.pending {
		if q.index > applied {
			rest = append(rest, q)
		} else if q.at.After(p.fresh) {
			p.fresh = q.at
		}
	}
	p.pending = rest
	return p.fresh
}

// lead records a proof made as leader in a term.
func (p *proofs) lead(term, index uint64, at time.Time) {
	p.note(index, at)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.led, p.ledTerm = proof{index, at}, term
}

// leader returns the latest proof if this node still leads in the same term.
func (p *proofs) leader(r *raft.Raft) (uint64, time.Time, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if r.State() != raft.Leader || p.ledTerm == 0 || p.ledTerm != r.CurrentTerm() {
		return 0, time.Time{}, errNotAppended
	}
	return p.led.index, p.led.at, nil
}

// Fresh returns how long ago it was last proven that this node had applied all
// that the cluster had committed: for a leader, since a quorum confirmed it; for
// others, since such a confirmation reached it from the leader. It is the longest
// duration there is if that was never proven.
func (n *Node) Fresh() time.Duration {
	at := n.proofs.latest(n.State().Index())
	if at.IsZero() || n.machine.halted.Load() || n.Probation() != nil {
		return math.MaxInt64
	}
	return since(at)
}

// since returns how long ago a time was taken, by the clock that says longer: the monotonic clock
// stands while the machine is suspended, the wall clock can be set back.
func since(at time.Time) time.Duration {
	now := time.Now()
	return max(now.Sub(at), now.Round(0).Sub(at.Round(0)))
}

// Barrier waits until this node has applied everything that the cluster had
// committed when Barrier was called, so that a read of State afterwards is
// linearizable. Error: kms.Unavailable if that was not reached before ctx ended
// (Timing.Propose without a deadline).
func (n *Node) Barrier(ctx context.Context) error {
	if err := n.up(); err != nil {
		return err
	}
	ctx, cancel := n.bound(ctx)
	defer cancel()
	var index uint64
	var start time.Time
	err := n.retry(ctx, func() (err error) {
		start = time.Now()
		if n.raft.State() == raft.Leader {
			index, _, err = n.leaderProof(ctx)
			return err
		}
		resp, _, err := n.callLeader(ctx, request{Op: opBarrier})
		if err != nil || resp.err() != nil {
			return errNotAppended // asking again does no harm
		}
		index = resp.Index
		return nil
	})
	if err != nil {
		return err
	}
	n.proofs.note(index, start)
	if err := n.waitApplied(ctx, index); err != nil {
		return errNotAppended
	}
	return nil
}

// leaderProof proves by a quorum that this node leads, and returns the index of
// the last command that was committed before, and the time of the proof. The
// error is errNotAppended if it does not lead.
func (n *Node) leaderProof(ctx context.Context) (index uint64, at time.Time, err error) {
	term := n.raft.CurrentTerm()
	if n.raft.State() != raft.Leader {
		return 0, at, errNotAppended
	}
	if n.readyTerm.Load() != term {
		// A new leader learns what is committed only with the first entry of its term.
		err := n.await(ctx, func() raft.Future { return n.raft.Barrier(n.cfg.Timing.RPC) })
		if err != nil || n.raft.CurrentTerm() != term {
			return 0, at, errNotAppended
		}
		n.readyTerm.Store(term)
	}
	at = time.Now()
	index = n.lastCommand(n.raft.CommitIndex())
	if !n.nudge() || !n.followed(ctx, term, at) {
		return 0, at, errNotAppended
	}
	n.proofs.lead(term, index, at)
	return index, at, nil
}

// nudge has Raft ask everybody at once whether they follow. Raft's own count of the answers
// is not waited for: contacts has a stricter one, and a Raft that stops answers nobody.
func (n *Node) nudge() bool {
	n.futures.Lock()
	defer n.futures.Unlock()
	if !n.futures.closed {
		n.futures.Go(func() { n.raft.VerifyLeader() })
	}
	return !n.futures.closed
}

// followed waits until a majority of the voters has answered what this node sent them
// as leader of a term at a time or later, and reports whether it was reached.
func (n *Node) followed(ctx context.Context, term uint64, at time.Time) bool {
	for {
		heard, changed := n.contacts.heard.wait(), n.leaders.wait()
		if n.raft.State() != raft.Leader || n.raft.CurrentTerm() != term {
			return false
		}
		if n.contacts.quorum(n.raft.GetConfiguration().Configuration().Servers, raft.ServerID(n.cfg.NodeID), term, at) {
			return true
		}
		select {
		case <-heard:
		case <-changed:
		case <-ctx.Done():
			return false
		case <-n.ctx.Done():
			return false
		}
	}
}

// lastCommand returns the index of the last command at or before upTo. Raft has
// entries of its own, which do not reach the state.
func (n *Node) lastCommand(upTo uint64) uint64 {
	first, err := n.logs.FirstIndex()
	for i := upTo; err == nil && i >= first && i > 0; i-- {
		var l raft.Log
		if err = n.logs.GetLog(i, &l); err != nil && !errors.Is(err, raft.ErrLogNotFound) {
			n.cfg.Logger.Warn("cannot read the log", "error", err)
		}
		if err == nil && l.Type == raft.LogCommand {
			return i
		}
	}
	// It is in the snapshot, which a leader has applied.
	return n.State().Index()
}

// proveMost is the longest time between two proofs of freshness, so that keyrings with a
// short max_staleness are served over long distances too.
const proveMost = 500 * time.Millisecond

// proveLoop renews the proof of freshness twice a heartbeat or more often.
func (n *Node) proveLoop(ctx context.Context) {
	tick := time.NewTicker(min(n.cfg.Timing.Heartbeat/2, proveMost))
	defer tick.Stop()
	for {
		n.prove(ctx)
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (n *Node) prove(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, min(n.cfg.Timing.RPC, 2*n.cfg.Timing.Heartbeat))
	defer cancel()
	if n.raft.State() == raft.Leader {
		_, _, _ = n.leaderProof(ctx) // not proven: Fresh grows
		return
	}
	start := time.Now()
	resp, _, err := n.callLeader(ctx, request{Op: opProof})
	if err == nil && resp.Status == statusOK && resp.Age >= 0 {
		n.proofs.note(resp.Index, start.Add(-time.Duration(resp.Age)))
		n.proofs.latest(n.State().Index())
	}
}
