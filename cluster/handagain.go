package cluster

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
)

// suspectLoop watches the leader until ctx ends, and hands in again what was lost on the
// way. Without that a leader could drop a command by breaking the connection on which it
// came, and would look like one who had lost it.
func (n *Node) suspectLoop(ctx context.Context) {
	var busy sync.WaitGroup
	defer busy.Wait()
	tick := time.NewTicker(n.suspects.limit / 30)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		leader, term := n.leads()
		for _, raw := range n.suspects.look(time.Now(), leader, term, n.Fresh()) {
			busy.Go(func() { n.handAgain(ctx, raw) })
		}
	}
}

// handAgain hands in once more a command whose outcome is not known. It is in the log at
// most once: this node's state says so, or the leader's.
func (n *Node) handAgain(ctx context.Context, raw []byte) {
	ctx, cancel := context.WithTimeout(ctx, n.suspects.limit/6)
	defer cancel()
	if n.up() != nil {
		return
	}
	if err := n.precheck(ctx, raw); err != nil {
		if kms.KindOf(err) != kms.Unavailable {
			n.suspects.settled(raw)
		}
		return
	}
	if _, err := n.proposeOnce(ctx, raw); err != nil {
		n.cfg.Logger.Debug("a command was handed in again without an outcome", "error", err)
	}
}

// applies is what the machine calls after every entry that it has applied.
func (n *Node) applies(st *state.State, raw []byte, r state.Result) {
	if leaf, err := state.ParseLeaf(r.Leaf); err == nil { // the state machine has made it
		n.suspects.applied(leaf, time.Now())
	}
	if n.cfg.OnApply != nil {
		n.cfg.OnApply(st, raw, r)
	}
}

// suspect says what this node has come to suspect.
func (n *Node) suspect(s Suspicion) {
	n.cfg.Logger.Error("suspicion: "+s.Text, "kind", s.Kind, "leader", s.Leader, "term", s.Term, "origin", s.Origin)
	if n.cfg.OnSuspicion == nil {
		return
	}
	n.futures.Lock()
	defer n.futures.Unlock()
	if !n.futures.closed {
		n.futures.Go(func() { n.cfg.OnSuspicion(s) })
	}
}

// watched notes what became of a command that was handed in with an error.
func (n *Node) watched(raw []byte, err error) {
	switch {
	case errors.Is(err, errNotAppended):
		n.suspects.refuse(raw, time.Now())
	case errors.Is(err, kms.Unknown):
		n.suspects.lose(raw)
	default:
		n.suspects.settled(raw)
	}
}

// doubt is asked about a leader's refusal. What a leader says against a command is not believed:
// the state here, once it is as new, says so too, or the command is handed in again. The
// leader's disk is its own affair, but then it says so to everybody.
func (n *Node) doubt(ctx context.Context, leader string, raw []byte, refusal error) error {
	switch kms.KindOf(refusal) {
	case kms.Unknown:
		return refusal
	case kms.ReadOnly:
		if a, ok := n.peers.of(leader); ok && a.ReadOnly {
			return refusal
		}
		return errNotAppended
	}
	if err := n.Barrier(ctx); err != nil {
		return errNotAppended
	}
	if err := n.State().Check(raw); err != nil {
		return err
	}
	n.cfg.Logger.Warn("the leader refuses a command that is in order here; handing it in again", "leader", leader, "error", refusal)
	return errNotAppended
}
