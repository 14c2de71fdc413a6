package cluster

import (
	"context"
	"errors"
	"time"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
)

var (
	// errNotAppended: the request has certainly left no trace in the log.
	errNotAppended = kms.Errorf(kms.Unavailable, "the cluster has no leader that this node can reach")
	// errGaveUp: the wait ended before the answer.
	errGaveUp   = errors.New("cluster: gave up waiting")
	errHalted   = kms.Errorf(kms.Unavailable, "the node has halted and must be looked at by its operator")
	errStopping = kms.Errorf(kms.Unavailable, "the node is stopping")
	errUnknown  = kms.Errorf(kms.Unknown, "the outcome is not known: contact with the leader was lost while it was at work; ask again with the same idempotency key")
)

// Propose has the cluster apply a signed command, whichever node leads, and
// waits until it is applied here too: the result is what this node itself made of
// it, not the leader's word. It is valid whenever its Index is not 0; the error is
// then Result.Err. A repeated command (Result.Duplicate) is a result like any other.
//
// Without a result the error says what is certain: kms.Unknown if the command may
// or may not be applied, now or later; kms.Unavailable if no leader was found
// before ctx ended (Timing.Propose without a deadline), kms.ReadOnly if the
// leader's disk is nearly full, kms.TooLarge above MaxCommand, and whatever
// State.Check says; in all these cases the command is not in the log. One whose outcome is
// not known is handed in again for a while, see suspect.go.
func (n *Node) Propose(ctx context.Context, raw []byte) (state.Result, error) {
	if len(raw) > MaxCommand {
		return state.Result{}, kms.Errorf(kms.TooLarge, "command of %d bytes exceeds the limit of %d", len(raw), MaxCommand)
	}
	if err := n.up(); err != nil {
		return state.Result{}, err
	}
	ctx, cancel := n.bound(ctx)
	defer cancel()
	if err := n.precheck(ctx, raw); err != nil {
		return state.Result{}, err
	}
	n.counters.proposed.Add(1)
	ctx, cancelMost := context.WithTimeout(ctx, n.suspects.most())
	defer cancelMost()
	n.suspects.hand(raw, time.Now())
	result, err := n.handIn(ctx, raw)
	if err != nil && result.Index == 0 {
		if errors.Is(err, kms.Unknown) {
			n.counters.unknown.Add(1)
		}
		n.watched(raw, err)
		return state.Result{}, err
	}
	return result, err
}

// handIn has the leader take a command, and returns what this node has made of it.
func (n *Node) handIn(ctx context.Context, raw []byte) (state.Result, error) {
	var result state.Result
	err := n.retry(ctx, func() (err error) {
		result, err = n.proposeOnce(ctx, raw)
		return err
	})
	if err != nil {
		return state.Result{}, err
	}
	if err := n.waitApplied(ctx, result.Index); err != nil {
		return state.Result{}, kms.Wrap(kms.Unknown, err, "the leader has applied the command, this node not yet", "ask again with the same idempotency key")
	}
	own, ok := n.machine.recent.of(result.Index, raw)
	if !ok { // the leader's word alone, or the entry came with a snapshot
		n.cfg.Logger.Warn("the log entry that the leader named is not known here as this command", "index", result.Index)
		return state.Result{}, errUnknown
	}
	return own, own.Err()
}

// precheck spares the log a command that would have no effect. A node that lags, or
// leads no longer, may be wrong about that, so it catches up before it says no.
func (n *Node) precheck(ctx context.Context, raw []byte) error {
	st := n.State()
	err := st.Check(raw)
	if err == nil {
		return nil
	}
	if berr := n.Barrier(ctx); berr != nil {
		return kms.Wrap(kms.Unavailable, berr, err.Error()+"; but this node reaches no leader that could say whether that is still so",
			"try again, or use another node")
	}
	if now := n.State(); now != st {
		return now.Check(raw)
	}
	return err
}

// up returns an error if the node takes no more work.
func (n *Node) up() error {
	if n.machine.halted.Load() {
		return errHalted
	}
	if n.ctx.Err() != nil {
		return errStopping
	}
	return n.Probation()
}

// bound gives ctx a deadline if it has none.
func (n *Node) bound(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, n.cfg.Timing.Propose)
}

// retry calls f until it returns anything but errNotAppended.
func (n *Node) retry(ctx context.Context, f func() error) error {
	for delay := 10 * time.Millisecond; ; delay = min(2*delay, 200*time.Millisecond) {
		err := f()
		if !errors.Is(err, errNotAppended) {
			return err
		}
		select {
		case <-ctx.Done():
			return errNotAppended
		case <-n.ctx.Done():
			return n.up()
		case <-time.After(delay):
		}
	}
}

// proposeOnce hands the command to the leader known now.
func (n *Node) proposeOnce(ctx context.Context, raw []byte) (state.Result, error) {
	if n.raft.State() == raft.Leader {
		return n.proposeHere(ctx, raw)
	}
	_, leader := n.raft.LeaderWithID()
	resp, sent, err := n.callLeader(ctx, request{Op: opPropose, Raw: raw})
	switch {
	case err != nil && sent:
		n.cfg.Logger.Warn("lost contact with the leader during a proposal", "error", err)
		return state.Result{}, errUnknown
	case err != nil:
		return state.Result{}, errNotAppended
	}
	if err := resp.err(); err != nil {
		if !errors.Is(err, errNotAppended) {
			err = n.doubt(ctx, string(leader), raw, err)
		}
		return state.Result{}, err
	}
	n.counters.forwarded.Add(1)
	return resp.Result.result(), nil
}

// callLeader sends a request to the leader known now, and waits no longer for it
// once another node leads. sent is false if it has certainly not been received.
func (n *Node) callLeader(ctx context.Context, req request) (resp response, sent bool, err error) {
	_, leader := n.raft.LeaderWithID()
	if leader == "" || string(leader) == n.cfg.NodeID {
		return response{}, false, errNotAppended
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // ends with ctx
		for {
			changed := n.leaders.wait()
			if _, now := n.raft.LeaderWithID(); now != "" && now != leader {
				cancel()
				return
			}
			select {
			case <-changed:
			case <-ctx.Done():
				return
			}
		}
	}()
	return n.wire.call(ctx, string(leader), n.cfg.Timing.dial(), req)
}

// watchLeader fires n.leaders until ctx ends.
func (n *Node) watchLeader(ctx context.Context) {
	events := make(chan raft.Observation, 16)
	o := raft.NewObserver(events, false, func(o *raft.Observation) bool {
		_, ok := o.Data.(raft.LeaderObservation)
		return ok
	})
	n.raft.RegisterObserver(o)
	defer n.raft.DeregisterObserver(o)
	for {
		select {
		case <-events:
			n.leaders.fire()
		case <-ctx.Done():
			return
		}
	}
}

// proposeHere appends the command to the log as leader and waits until it is
// applied here.
func (n *Node) proposeHere(ctx context.Context, raw []byte) (state.Result, error) {
	if err := n.checkDisk(); err != nil {
		return state.Result{}, err
	}
	if err := n.prematureConfirmation(raw); err != nil {
		return state.Result{}, err
	}
	var future raft.ApplyFuture
	err := n.await(ctx, func() raft.Future {
		deadline, _ := ctx.Deadline() // bound has set one
		future = n.raft.Apply(raw, max(time.Until(deadline), time.Millisecond))
		return future
	})
	switch {
	case err == nil:
	case errors.Is(err, raft.ErrNotLeader), errors.Is(err, raft.ErrLeadershipTransferInProgress),
		errors.Is(err, raft.ErrEnqueueTimeout), errors.Is(err, errNotAppended):
		return state.Result{}, errNotAppended
	default:
		n.cfg.Logger.Warn("a proposal ended without an outcome", "error", err)
		return state.Result{}, errUnknown
	}
	result, ok := future.Response().(state.Result)
	if !ok {
		return state.Result{}, errUnknown // this node has halted; the others may go on
	}
	return result, nil
}

// waitApplied waits until this node has applied the entry at index.
func (n *Node) waitApplied(ctx context.Context, index uint64) error {
	for {
		changed := n.Changed()
		if n.State().Index() >= index {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		case <-n.ctx.Done():
			return n.up()
		}
	}
}

// answer implements answerer.
func (n *Node) answer(ctx context.Context, peer string, req request) response {
	if req.Op == opPing {
		return response{Status: statusOK, Info: n.answerPing()}
	}
	if req.Op == opMark || req.Op == opRecall {
		return n.answerMemory(peer, req)
	}
	if n.up() != nil || !n.running() {
		return response{Status: statusNotLeader}
	}
	var err error
	resp := response{Status: statusOK}
	switch req.Op {
	case opPropose:
		resp.Result, err = n.answerPropose(ctx, req.Raw)
	case opBarrier:
		resp.Index, _, err = n.leaderProof(ctx)
	case opProof:
		var at time.Time
		if resp.Index, at, err = n.proofs.leader(n.raft); err == nil {
			resp.Age = int64(since(at))
		}
	case opHash:
		resp.Hash = n.hashes.at(req.Size)
	case opRecords:
		resp.Info, err = n.answerRecords(req.Size)
	default:
		err = kms.Errorf(kms.Invalid, "node %s asked for operation %d, which this release does not know", peer, req.Op)
	}
	if errors.Is(err, errNotAppended) {
		return response{Status: statusNotLeader}
	}
	if err != nil {
		return errorResponse(err)
	}
	return resp
}

func (n *Node) answerPropose(ctx context.Context, raw []byte) (outcome, error) {
	if n.raft.State() != raft.Leader {
		return outcome{}, errNotAppended
	}
	if err := n.leaderCheck(ctx, raw); err != nil {
		return outcome{}, err
	}
	result, err := n.proposeHere(ctx, raw)
	if err != nil {
		return outcome{}, err
	}
	return toOutcome(result), nil
}

// leaderCheck is precheck for a command of another node: errNotAppended if this one does
// not lead any more, or has not applied all that was committed.
func (n *Node) leaderCheck(ctx context.Context, raw []byte) error {
	if n.State().Check(raw) == nil {
		return nil
	}
	index, _, err := n.leaderProof(ctx)
	if err == nil && n.waitApplied(ctx, index) != nil {
		err = errNotAppended
	}
	if err != nil {
		return err
	}
	return n.State().Check(raw)
}
