package cluster

import (
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms"
)

// ErrRolledBack is in the chain of the reason with which a running node halts when it
// learns that its disk was put back to an older state. Opened again it starts on probation.
var ErrRolledBack = errors.New("cluster: the node's disk was put back to an older state")

// probation says what a node may do that does not know, or knows that it has
// forgotten, what it has promised. A node that was put back to an older state would
// vote twice in a term, or help to elect a leader that lacks what it had stored. So it
// takes no part in elections and serves nothing until it has caught up.
type probation struct {
	log *slog.Logger

	mu      sync.Mutex
	settled bool      // enough others have said what they know of this node
	held    bool      // this node has forgotten what it promised
	until   *position // how far its promises went; nil: further than anybody knows
	why     string
	guard   *guard

	refused atomic.Uint64 // messages of Raft
}

var errUnsettled = errors.New("this node does not know yet whether it remembers its promises")

// refuses returns why a message of Raft does not pass, nil if it does.
func (p *probation) refuses(election bool) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case !p.settled:
		p.refused.Add(1)
		return errUnsettled
	case p.held && (election || p.until == nil):
		p.refused.Add(1)
		return p.err()
	}
	return nil
}

// err says why the node serves nothing. mu is held.
func (p *probation) err() error {
	fix := "it goes on by itself when it has caught up; find out who put back its disk, and when"
	if p.until == nil {
		fix = "nodes that remember more must be reachable; if all were put back, the custodians must approve it: conclave recover"
	}
	return &kms.Error{Kind: kms.Unavailable, Msg: "this node is on probation: " + p.why, Fix: fix}
}

// state returns what Probation and Fresh say: settled, and the reason of being held.
func (p *probation) state() (settled bool, held error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.held {
		held = p.err()
	}
	return p.settled, held
}

// hold begins probation.
func (p *probation) hold(until *position, why string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.held, p.until, p.why = true, until, why
	p.log.Error("this node was put back to an older state: it is on probation, neither votes nor serves until it has caught up", "why", why)
}

// waitsFor returns whether the node is held, and until where.
func (p *probation) waitsFor() (until *position, held bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.until, p.held
}

// close ends the guard of a node that does not start.
func (p *probation) close() {
	if p.guard != nil {
		p.guard.once.Do(func() { close(p.guard.done) })
	}
}

func (p *probation) settle() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.settled = true
}

// over ends probation if the node is at or beyond what it waits for.
func (p *probation) over(at position) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.held || p.until == nil || at.before(*p.until) {
		return false
	}
	p.held = false
	p.log.Warn("this node has caught up with what it had promised: probation is over", "index", at.Index, "term", at.Term)
	return true
}

// Probation returns why this node serves nothing although it runs: it knows that its
// disk was put back to an older state, and has not caught up with what it had promised.
// nil if it may serve. The error is of kind kms.Unavailable.
func (n *Node) Probation() error {
	_, held := n.probation.state()
	return held
}

// storedPosition is the node's position by its disk.
func storedPosition(logs raft.LogStore, stable raft.StableStore, snapshots raft.SnapshotStore) (position, error) {
	var p position
	term, err := stable.GetUint64([]byte(keyTerm))
	if err != nil && !missing(err) {
		return p, err
	}
	p.Term = term
	last, err := logs.LastIndex()
	if err != nil {
		return p, err
	}
	if last > 0 {
		var l raft.Log
		if err := logs.GetLog(last, &l); err != nil {
			return p, err
		}
		p.Index, p.LogTerm = l.Index, l.Term
	}
	metas, err := snapshots.List()
	if err != nil {
		return p, err
	}
	if len(metas) > 0 && metas[0].Index > p.Index {
		p.Index, p.LogTerm = metas[0].Index, metas[0].Term
	}
	return p, nil
}

// promiseTerm makes Raft keep a term that this node had promised before its disk was
// put back. Whom it voted for in that term is not known, so it votes for nobody in it.
func promiseTerm(stable raft.StableStore, own, promised uint64) error {
	voted, err := stable.GetUint64([]byte(keyVoteTerm))
	if err != nil && !missing(err) {
		return kms.Wrap(kms.Unavailable, err, "cannot read the vote: "+err.Error(), storeFix)
	}
	if voted < promised {
		err = stable.Set([]byte(keyVote), []byte("(forgotten)"))
		if err == nil {
			err = stable.SetUint64([]byte(keyVoteTerm), promised)
		}
	} else {
		err = nil
	}
	if err == nil && own < promised {
		err = stable.SetUint64([]byte(keyTerm), promised)
	}
	if err != nil {
		return kms.Wrap(kms.Unavailable, err, "cannot write the term and vote: "+err.Error(), storeFix)
	}
	return nil
}

// position is the node's position now. What it says of the log is on the disk.
func (n *Node) position() position {
	p := position{Term: n.raft.CurrentTerm()}
	last := n.raft.LastIndex()
	if term, ok := n.logs.term(last); ok { // else its end was removed just now, which is noted
		p.Index, p.LogTerm = last, term
	}
	return n.logs.reached(p)
}
