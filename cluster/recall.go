package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
)

// memory is how a node finds out what it had promised, and lets the others know what
// it promises.
type memory struct {
	others   *promises
	seen     recalled
	count    counter
	accepted bool                   // see acceptedFile; at the start
	marker   atomic.Pointer[marker] // nil until the device has signed its key
	start    position               // by the disk, before Raft started
	judged   position               // up to here the marks of this node were looked at
}

// openMemory reads what the disk keeps. With a log of its own the caller has the disk:
// then it is kept in memory.
func (n *Node) openMemory() {
	path := n.dir.file(promisesFile)
	if n.cfg.Log != nil {
		path = ""
	}
	n.memory.others = openPromises(path, n.cfg.Logger)
	n.memory.count.device = n.cfg.Counter
	n.probation.log = n.cfg.Logger
}

// recall finds out, before Raft starts, whether this node remembers its promises, and
// writes the term that it had promised into the stable store: Raft keeps that part itself.
func (n *Node) recall(ctx context.Context, stable raft.StableStore, snapshots raft.SnapshotStore) error {
	own, err := storedPosition(n.logs, stable, snapshots)
	if err != nil {
		return kms.Wrap(kms.Unavailable, err, fmt.Sprintf("cannot read the end of the log: %v", err), storeFix)
	}
	n.appliedBefore(own.Index)
	own = n.logs.reached(own)
	n.memory.judged, n.memory.start = own, own
	self, err := n.ownMark()
	if err != nil {
		n.cfg.Logger.Warn("the node's own last promise cannot be used", "error", err)
	}
	if err := n.memory.count.read(ctx, self); err != nil {
		return err
	}
	n.askAll(ctx)
	if n.memory.accepted = n.accepted(); n.memory.accepted {
		n.cfg.Logger.Warn("the custodians have approved that this node begins with an older state")
		n.judgeEpoch(own)
	} else if err := n.judge(own); err != nil {
		return err
	}
	until, held := n.probation.waitsFor()
	if !held || until == nil {
		return nil
	}
	return promiseTerm(stable, own.Term, until.Term)
}

// ownMark returns what this node has kept of its own promises, nil for nothing.
func (n *Node) ownMark() (*mark, error) {
	raw := n.memory.others.of(n.cfg.NodeID)
	if raw == nil {
		return nil, nil
	}
	m, err := parseMark(raw)
	if err == nil {
		err = m.verify(n.machine.cluster, n.cfg.NodeID, ownKeys(n.machine.trust, n.State()))
	}
	if err != nil {
		return nil, err
	}
	n.memory.seen.heard(n.cfg.NodeID, &m)
	return &m, nil
}

// judgeEpoch holds a node that begins its epoch anew to what it had promised in that very
// epoch before: the approval is for what came before it. Only nodes of the epoch answer.
func (n *Node) judgeEpoch(own position) {
	until, _ := n.memory.seen.furthest()
	if n.dir.id.Epoch == 0 || until.Term <= epochTerm(n.dir.id.Epoch) || !own.before(until) {
		return
	}
	n.memory.judged = n.memory.judged.join(until)
	n.probation.hold(&until, fmt.Sprintf("it took part in epoch %d before, up to entry %d of term %d, and begins it anew at entry %d", n.dir.id.Epoch, until.Index, until.LogTerm, own.Index))
}

// judge begins probation if this node has promised more than its disk knows.
func (n *Node) judge(own position) error {
	until, counted := n.memory.seen.furthest()
	n.memory.judged = n.memory.judged.join(until)
	device, behind := n.memory.count.behind()
	switch {
	case own.empty() && !until.empty():
		return errGone
	case behind && counted < device:
		n.probation.hold(nil, fmt.Sprintf("its device has counted to %d, its disk is from before that, and no node in reach remembers so much", device))
	case own.before(until):
		n.probation.hold(&until, fmt.Sprintf("it had stored the log up to entry %d of term %d and promised term %d, its disk ends at entry %d of term %d and term %d",
			until.Index, until.LogTerm, until.Term, own.Index, own.LogTerm, own.Term))
	case behind:
		n.probation.hold(&until, fmt.Sprintf("its device has counted to %d, its disk is from before that", device))
	}
	return nil
}

// errGone: a machine set up anew under the name of a node that was there before.
var errGone error = &kms.Error{Kind: kms.Conflict, Msg: "this node has an empty log, but others hold what it had promised: its log is gone",
	Fix: "remove the node (conclave node remove) and let the machine join under a new name"}

// judgeLate looks at marks that came when Raft was running already. What Raft has in
// memory cannot be mended, so the node halts, to start again on probation.
func (n *Node) judgeLate() {
	until, counted := n.memory.seen.furthest()
	waits, held := n.probation.waitsFor()
	device, _ := n.memory.count.behind()
	resolved := held && waits == nil && counted >= device
	if !n.memory.judged.before(until) && !resolved {
		return
	}
	n.memory.judged = n.memory.judged.join(until)
	if !resolved && !n.position().before(until) {
		n.cfg.Logger.Warn("this node had been put back to an older state; it had caught up before that was known")
		return
	}
	if n.memory.start.empty() {
		n.machine.halt(errGone)
		return
	}
	err := n.memory.others.set(n.cfg.NodeID, n.memory.seen.evidence())
	if err == nil {
		err = n.memory.others.save()
	}
	n.machine.halt(errors.Join(ErrRolledBack, err))
}

// recalled are the marks of this node, of former runs, that others have shown.
type recalled struct {
	mu    sync.Mutex
	marks map[string]mark // by the node that showed it; empty for none
}

// heard notes an answer; a nil mark is one as well.
func (r *recalled) heard(peer string, m *mark) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.marks == nil {
		r.marks = map[string]mark{}
	}
	if m == nil {
		m = &mark{}
	}
	r.marks[peer] = *m
}

func (r *recalled) has(peer string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, ok := r.marks[peer]
	return ok
}

// furthest returns what all marks together say, and the highest counter in them.
func (r *recalled) furthest() (at position, counter uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, m := range r.marks {
		at, counter = at.join(m.At), max(counter, m.Counter)
	}
	return at, counter
}

// evidence returns the mark that goes furthest.
func (r *recalled) evidence() []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	var best mark
	for _, m := range r.marks {
		if best.At.logBefore(m.At) || best.At == m.At && best.Counter < m.Counter {
			best = m
		}
	}
	return canon.Marshal(best)
}

// ask has a peer show the mark that it keeps of this node.
func (n *Node) ask(ctx context.Context, peer string) error {
	resp, _, err := n.wire.call(ctx, peer, n.cfg.Timing.dial(), request{Op: opRecall})
	if err != nil {
		return err
	}
	if resp.Status == statusNotLeader {
		return errStopping
	}
	var kept keptMark
	if resp.Status == statusOK { // else a release that keeps no marks
		if err := canon.Unmarshal(resp.Info, &kept); err != nil {
			return err
		}
	}
	if len(kept.Mark) == 0 {
		n.memory.seen.heard(peer, nil)
		return nil
	}
	m, err := parseMark(kept.Mark)
	if err == nil {
		err = m.verify(n.machine.cluster, n.cfg.NodeID, ownKeys(n.machine.trust, n.State()))
	}
	switch {
	case err != nil:
		n.cfg.Logger.Warn("another node shows a promise of this node that this node has not made", "peer", peer, "error", err)
		n.memory.seen.heard(peer, nil)
	case n.memory.marker.Load().made(m): // in this run
		n.memory.seen.heard(peer, nil)
	default:
		n.memory.seen.heard(peer, &m)
	}
	return nil
}

// keptMark is the answer to opRecall.
type keptMark struct {
	Mark []byte `cbor:"mark"` // empty for none
}

// askAll asks the other nodes at the start. It waits for all of them for half a
// heartbeat, in which five messages go there and back over the longest distance that the
// timing is for and a first call takes four, and for as many as make a majority for a whole one.
func (n *Node) askAll(ctx context.Context) {
	if !n.dir.id.Initialised {
		return // nothing to forget; the others are starting, too
	}
	ctx, cancel := context.WithTimeout(ctx, n.cfg.Timing.Heartbeat)
	defer cancel()
	var wg sync.WaitGroup
	for _, peer := range n.others() {
		wg.Go(func() {
			for n.ask(ctx, peer) != nil {
				select {
				case <-ctx.Done():
					return
				case <-time.After(n.cfg.Timing.Heartbeat / 16):
				}
			}
		})
	}
	all := make(chan struct{})
	go func() {
		wg.Wait()
		close(all)
	}()
	select {
	case <-all:
		return
	case <-time.After(n.cfg.Timing.Heartbeat / 2):
	}
	for !n.heardEnough() {
		select {
		case <-all:
			return
		case <-time.After(n.cfg.Timing.Heartbeat / 16):
		}
	}
	cancel()
	<-all
}

// others lists the other nodes.
func (n *Node) others() []string { return n.introductions().others() }

// heardEnough reports whether so many voters have answered that, with this node, they
// are a majority: without them it could neither elect nor follow a leader anyway.
func (n *Node) heardEnough() bool {
	voters, heard := n.voters(), 0
	for _, id := range voters {
		if id == n.cfg.NodeID || n.memory.seen.has(id) {
			heard++
		}
	}
	return heard > len(voters)/2
}

// voters lists the voters as Raft counts them, once it is there: the state lags behind
// the log at the start. A node that joins has no list yet and goes by those it was introduced to,
// or the genesis.
func (n *Node) voters() (ids []string) {
	if n.raft != nil {
		if ids = votersIn(n.raft.GetConfiguration().Configuration()); ids != nil {
			return ids
		}
	}
	if _, member := n.State().Node(n.cfg.NodeID); !member && len(n.cfg.Introduced.Nodes) > 0 {
		for _, node := range n.cfg.Introduced.Nodes {
			ids = append(ids, node.ID)
		}
		return ids
	}
	for _, node := range n.State().Nodes() {
		if node.Voter {
			ids = append(ids, node.ID)
		}
	}
	return ids
}

func (n *Node) settleIfHeard() bool {
	if settled, _ := n.probation.state(); settled {
		return true
	}
	if n.heardEnough() {
		n.probation.settle()
		return true
	}
	return false
}

// acceptedFile says that the custodians have approved that the node begins with an
// older state than it had promised.
const acceptedFile = "accepted"

// AcceptRollback has the next start of the node with this data directory take it as it
// is, whatever was promised or counted before. It is for the recovery of a cluster that
// the custodians have approved, and for nothing else: a node that forgets its promises
// while others rely on them breaks the cluster's. Errors: kms.Unavailable.
func AcceptRollback(dir string) error {
	path := (&dataDir{path: dir}).file(acceptedFile)
	if err := writeFile(path, []byte("approved\n")); err != nil {
		return kms.Wrap(kms.Unavailable, err, fmt.Sprintf("cannot write %s: %v", path, err), "")
	}
	return nil
}

func (n *Node) accepted() bool {
	_, err := os.Lstat(n.dir.file(acceptedFile))
	return err == nil
}
