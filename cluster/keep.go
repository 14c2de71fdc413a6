package cluster

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
)

// keepMemory lets the others know what this node promises, keeps what they promise,
// goes on asking who has not answered yet, and ends probation.
func (n *Node) keepMemory(ctx context.Context) {
	tick := time.NewTicker(n.cfg.Timing.Heartbeat / 8)
	defer tick.Stop()
	talks := talks{busy: map[string]bool{}, told: map[string]told{}}
	defer talks.wg.Wait()
	var saved, failed time.Time
	for {
		if n.memory.marker.Load() == nil && time.Since(failed) > n.cfg.Timing.Heartbeat {
			if err := n.beginMarks(ctx); err != nil && ctx.Err() == nil {
				failed = time.Now()
				n.cfg.Logger.Warn("the device does not sign what this node promises; trying on", "error", err)
			}
		}
		if n.settleIfHeard() {
			n.judgeLate()
			n.endProbation(ctx)
		}
		n.talk(ctx, &talks)
		if time.Since(saved) >= saveEvery {
			saved = time.Now()
			if err := n.memory.others.save(); err != nil {
				n.cfg.Logger.Warn("cannot keep the promises of other nodes on disk", "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// beginMarks has the device sign the key of this run.
func (n *Node) beginMarks(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, signTimeout)
	defer cancel()
	t := n.machine.trust
	k, err := newMarker(ctx, n.machine.cluster, n.cfg.NodeID, signingKey{t.suite, t.signing}, t.signer)
	if err != nil {
		return err
	}
	n.memory.marker.Store(k)
	return nil
}

// endProbation ends it when this node has all that it had promised and, by a proof of
// the leader, all that was committed. From then on it counts with its device.
func (n *Node) endProbation(ctx context.Context) {
	if n.memory.marker.Load() == nil {
		return
	}
	at := n.position()
	if _, held := n.probation.waitsFor(); held {
		if n.proofs.latest(n.State().Index()).IsZero() || !n.probation.over(at) {
			return
		}
	}
	if n.memory.count.device == nil && n.memory.accepted {
		_ = n.useAccepted() // tried again; it stays in force for this run, and the next looks again
	}
	if !n.memory.count.due(at, time.Now()) {
		return
	}
	if err := n.advance(ctx, at); err != nil && ctx.Err() == nil {
		n.memory.count.put(time.Now())
		n.cfg.Logger.Warn("the device's counter could not be advanced; trying on", "error", err)
	}
}

// advance has the device count, and keeps this node's position with the count. A disk
// that is ahead of the device is no sign of anything: the step may be cut short anywhere.
func (n *Node) advance(ctx context.Context, at position) error {
	ctx, cancel := context.WithTimeout(ctx, signTimeout)
	defer cancel()
	now, next, err := n.memory.count.next(ctx)
	if err != nil {
		return err
	}
	if kept := n.memory.count.keeps(); kept > now+2 {
		n.cfg.Logger.Error("the device's counter has gone back: it was set back, removed, or the device is another", "count", now, "kept", kept)
	}
	if err := n.keepOwn(at, next); err != nil {
		return err
	}
	n.foretell(ctx, at, next)
	v, err := n.memory.count.device.Increment(ctx)
	if err != nil {
		return err
	}
	if err := n.keepOwn(at, v); err != nil {
		return err
	}
	n.memory.count.counted(v, at, time.Now())
	n.cfg.Logger.Info("the device has counted: a disk from before is known from now on", "count", v)
	if n.memory.accepted {
		return n.useAccepted()
	}
	return nil
}

// foretell gives the peers in reach a mark with the count that the device is about to reach, so
// that they know how far this node was if its disk is put back at once.
func (n *Node) foretell(ctx context.Context, at position, counter uint64) {
	ctx, cancel := context.WithTimeout(ctx, n.cfg.Timing.Heartbeat/4) // meanwhile nothing else is told
	defer cancel()
	raw := canon.Marshal(n.memory.marker.Load().at(at, counter))
	var told sync.WaitGroup
	for _, peer := range n.others() {
		told.Go(func() {
			if err := n.tell(ctx, peer, raw); err != nil {
				n.cfg.Logger.Debug("a node does not hear that the device counts", "peer", peer, "error", err)
			}
		})
	}
	told.Wait()
}

// useAccepted removes the approval: it is for one start.
func (n *Node) useAccepted() error {
	err := os.Remove(n.dir.file(acceptedFile))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	n.memory.accepted = err != nil
	return err
}

// keepOwn keeps a mark of this node on its own disk.
func (n *Node) keepOwn(at position, counter uint64) error {
	if err := n.memory.others.set(n.cfg.NodeID, canon.Marshal(n.memory.marker.Load().at(at, counter))); err != nil {
		return err
	}
	return n.memory.others.save()
}

// told is what a peer has been told last.
type told struct {
	at      position
	counter uint64
}

// talks are the calls to peers under way; one to each at a time.
type talks struct {
	wg   sync.WaitGroup
	mu   sync.Mutex
	busy map[string]bool
	told map[string]told
}

// talk asks those who have not answered yet, and tells the others what is new.
func (n *Node) talk(ctx context.Context, t *talks) {
	at := told{n.position(), n.memory.count.value()}
	_, held := n.probation.waitsFor()
	var raw []byte
	for _, peer := range n.others() {
		ask := !n.memory.seen.has(peer)
		t.mu.Lock()
		tell := !ask && !held && n.memory.marker.Load() != nil && t.told[peer] != at
		busy := t.busy[peer]
		t.busy[peer] = busy || ask || tell
		t.mu.Unlock()
		if busy || !ask && !tell {
			continue
		}
		if tell && raw == nil {
			raw = canon.Marshal(n.memory.marker.Load().at(at.at, at.counter))
		}
		t.wg.Go(func() {
			ctx, cancel := context.WithTimeout(ctx, n.cfg.Timing.RPC)
			defer cancel()
			var err error
			if ask {
				err = n.ask(ctx, peer)
			} else {
				err = n.tell(ctx, peer, raw)
			}
			t.mu.Lock()
			defer t.mu.Unlock()
			t.busy[peer] = false
			if tell && err == nil {
				t.told[peer] = at
			}
		})
	}
}

// tell gives a peer a mark of this node.
func (n *Node) tell(ctx context.Context, peer string, raw []byte) error {
	resp, _, err := n.wire.call(ctx, peer, n.cfg.Timing.dial(), request{Op: opMark, Raw: raw})
	if err != nil {
		return err
	}
	if resp.Status == statusNotLeader {
		return errStopping
	}
	return nil // an error is of a release that keeps none
}

// answerMemory answers opRecall and opMark, also before Raft runs.
func (n *Node) answerMemory(peer string, req request) response {
	if req.Op == opRecall {
		return response{Status: statusOK, Info: canon.Marshal(keptMark{Mark: n.memory.others.of(peer)})}
	}
	if _, ok := n.State().Node(peer); !ok {
		return errorResponse(kms.Errorf(kms.Denied, "%q is not a node of this cluster", peer))
	}
	verify := func(m mark) error { return m.verify(n.machine.cluster, peer, knownKeys(n.State(), peer)) }
	if err := n.memory.others.note(peer, req.Raw, verify); err != nil {
		return errorResponse(err)
	}
	return response{Status: statusOK}
}
