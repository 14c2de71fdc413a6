package cluster

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
)

// Node is a running member of the cluster. Its methods may be called
// concurrently.
type Node struct {
	cfg     Config
	self    state.Node
	dir     *dataDir
	store   LogStore
	logs    *trimmedLog
	wire    wire
	machine *machine
	hashes  *hashes
	watch   *watch
	raft    *raft.Raft
	ready   chan struct{} // closed when raft is set

	ctx    context.Context // of the node's life; ends with Close or a halt
	cancel context.CancelFunc
	loops  sync.WaitGroup

	futures struct { // goroutines that wait for an answer of Raft
		sync.Mutex
		sync.WaitGroup
		closed bool
	}
	stop     sync.Once
	stopped  raft.Future
	done     chan error
	doneOnce sync.Once

	leaders   signal // fires when another node leads, or none
	readOnly  atomic.Bool
	readyTerm atomic.Uint64 // the term in which this node, as leader, has applied all that was committed before it
	proofs    proofs
	contacts  contacts
	counters  counters
	told      sync.Map // peers of other epochs that the log speaks of
	farewells farewells

	before    uint64 // index of the last entry applied in former runs; 0 if the log does not go so far
	probation probation
	memory    memory

	profile Profile // in force; "" where the configuration gives the heartbeat
	peers   *peers
	kept    atomic.Pointer[kept] // on disk

	suspects *suspects
}

// Open starts the node. On an empty data directory a node of the genesis begins with
// the genesis; all of them do so with the same list of members. Any other node has an empty
// log until the leader sends it the cluster's, once a proposal has made it a member. A data
// directory of another cluster or node, or one that others can read, is refused.
// ctx bounds opening only. On error Config.Listener is closed.
func Open(ctx context.Context, cfg Config) (n *Node, err error) {
	defer func() {
		if err != nil && cfg.Listener != nil {
			_ = cfg.Listener.Close()
		}
	}()
	cfg, err = cfg.check()
	if err != nil {
		return nil, err
	}
	genesis, err := state.New(cfg.Genesis)
	if err != nil {
		return nil, err
	}
	self, err := cfg.self(genesis)
	if err != nil {
		return nil, err
	}
	if err := checkOwnCertificate(introductions{State: genesis, self: self, told: cfg.Introduced}, cfg.NodeID, cfg.Certificate); err != nil {
		return nil, err
	}
	dir, err := openDataDir(cfg.DataDir, genesis.Cluster(), cfg.NodeID)
	if err != nil {
		return nil, err
	}
	if _, founder := genesis.Node(cfg.NodeID); !founder {
		if err := dir.introduce(cfg.Introduced); err != nil {
			return nil, err
		}
	}
	if err := checkNotRemoved(dir); err != nil {
		return nil, err
	}
	n = &Node{cfg: cfg, self: self, dir: dir, watch: newWatch(), ready: make(chan struct{}), done: make(chan error, 1), peers: newPeers()}
	n.suspects = newSuspects(cfg.NodeID, cfg.Timing.Suspect, func(raw []byte) bool { return n.State().Check(raw) == nil }, n.suspect)
	n.kept.Store(n.loadKept())
	n.ctx, n.cancel = context.WithCancel(context.Background())
	if err := n.open(ctx, genesis); err != nil {
		select {
		case why := <-n.done: // it halted meanwhile: nothing that failed after that is the reason
			err = why
		default:
		}
		n.abandon()
		return nil, err
	}
	return n, nil
}

// open brings the parts up. On error the caller abandons the node.
func (n *Node) open(ctx context.Context, genesis *state.State) error {
	logger := raftLogger(n.cfg.Logger, *n.cfg.RaftLogLevel)
	if err := n.openStore(); err != nil {
		return err
	}
	snapshots, err := newSnapshotStore(n.dir.path, logger)
	if err != nil {
		return kms.Wrap(kms.Unavailable, err, fmt.Sprintf("cannot open the snapshots: %v", err), "")
	}
	snapshots.stands = n.logs.snapshotAt
	n.buildMachine(genesis, snapshots)

	if n.wire, err = n.newWire(ctx, genesis); err != nil {
		return err
	}
	n.openMemory()
	n.wire.serve(n)
	n.chooseProfile(ctx)
	term := func() uint64 { return n.raft.CurrentTerm() }
	known := func() uint64 { return max(term(), epochTerm(n.dir.id.Epoch)) } // a node that joins is still in term 0
	vetted := newVet(n.wire.transport(), n.ready, known, func() uint64 { return n.raft.LastIndex() }, n.cfg.Logger)
	tidied := newTidy(n.probation.transport(vetted), &held{n.logs, snapshots, n.applied, term}, n.machine.halt)
	gate := newGate(tidied, n.State, n.logs, n.cfg.Timing.Heartbeat/2, n.cfg.Logger, &n.contacts)
	if err := n.openRaft(ctx, genesis, snapshots, gate); err != nil {
		_ = gate.Close()
		return err
	}
	close(n.ready)
	n.loops.Go(func() { n.watchLeader(n.ctx) })
	n.loops.Go(func() { n.supervise(n.ctx) })
	n.loops.Go(func() { n.proveLoop(n.ctx) })
	n.loops.Go(func() { n.hashes.run(n.ctx) })
	n.loops.Go(func() { n.pingLoop(n.ctx) })
	n.loops.Go(func() { n.keepMemory(n.ctx) })
	n.loops.Go(func() { n.preferLoop(n.ctx) })
	n.loops.Go(func() { n.followLoop(n.ctx) })
	n.loops.Go(func() { n.suspectLoop(n.ctx) })
	return nil
}

// running reports whether Raft has started.
func (n *Node) running() bool {
	select {
	case <-n.ready:
		return true
	default:
		return false
	}
}

// openStore opens the log: that of the configuration, or a file.
func (n *Node) openStore() (err error) {
	if n.cfg.Log != nil {
		n.store = n.cfg.Log
	} else if n.store, err = n.openFile(n.dir.file(logFile)); err != nil {
		return err
	}
	watched := &watchedStore{store: n.store, watch: n.watch}
	cache, err := raft.NewLogCache(512, watched)
	if err != nil {
		return err
	}
	if n.logs, err = openTrimmed(cache, watched); err != nil {
		return err
	}
	return checkModes(n.dir.path)
}

func (n *Node) openFile(path string) (LogStore, error) {
	if err := checkStore(path); err != nil {
		return nil, err
	}
	store, err := openBolt(path)
	if err != nil {
		return nil, storeError(path, err)
	}
	checked := &checkedStore{LogStore: store, path: path}
	if err := checked.checkAll(); err != nil {
		return nil, errors.Join(err, store.Close())
	}
	return checked, nil
}

func (n *Node) buildMachine(genesis *state.State, snapshots *snapshotStore) {
	n.hashes = &hashes{every: n.cfg.Timing.HashEvery, work: make(chan *state.State, 2), compare: n.compareHashes,
		log: n.cfg.Logger, known: map[uint64][]byte{}}
	n.machine = &machine{
		cluster: genesis.Cluster(), lineage: n.dir.lineage(), onApply: n.applies, onRestore: n.cfg.OnRestore, onSnapshot: n.cfg.OnSnapshot,
		trust:  newTrust(n.ctx, n.cfg, n.self, genesis.Cluster(), n.dir.file(trustDir)),
		hashes: n.hashes, snapshots: snapshots, watch: n.watch, log: n.cfg.Logger,
		onHalt: n.halted, background: n.loops.Go,
	}
	n.hashes.halt = n.machine.halt
	n.machine.state.Store(genesis)
}

// openRaft starts Raft, with the first configuration if the log is empty.
func (n *Node) openRaft(ctx context.Context, genesis *state.State, snapshots raft.SnapshotStore, transport raft.Transport) error {
	conf := n.raftConfig()
	stable := &watchedStore{store: n.store, watch: n.watch}
	exists, err := raft.HasExistingState(n.logs, stable, snapshots)
	if err != nil {
		return kms.Wrap(kms.Unavailable, err, fmt.Sprintf("cannot read the log: %v", err), "")
	}
	_, founder := genesis.Node(n.cfg.NodeID)
	switch {
	case exists:
	case n.dir.id.Initialised:
		return &kms.Error{Kind: kms.Conflict, Msg: "the log in " + n.dir.path + " is gone, though this node had one",
			Fix: storeFix}
	case !founder:
		n.cfg.Logger.Info("the log is empty: this node waits for the cluster's leader")
	default:
		if err := raft.BootstrapCluster(conf, n.logs, stable, snapshots, transport, servers(genesis.Members())); err != nil {
			return kms.Wrap(kms.Invalid, err, fmt.Sprintf("cannot begin the log: %v", err), "")
		}
	}
	if err := n.recall(ctx, stable, snapshots); err != nil {
		return err
	}
	if !n.dir.id.Initialised && (exists || founder) {
		if err := n.dir.initialised(); err != nil {
			return err
		}
	}
	if err := dropConflict(n.logs, snapshots); err != nil {
		return kms.Wrap(kms.Unavailable, err, fmt.Sprintf("cannot clear the log: %v", err), storeFix)
	}
	if err := n.startRaft(conf, stable, snapshots, transport); err != nil {
		return err
	}
	if err := clearBehind(n.logs, n.raft); err != nil {
		n.cfg.Logger.Error("cannot clear what the log has from before its snapshot", "error", err)
	}
	n.settleIfHeard()
	return nil
}

func (n *Node) raftConfig() *raft.Config {
	t := n.cfg.Timing
	c := raft.DefaultConfig()
	c.LocalID = raft.ServerID(n.cfg.NodeID)
	c.HeartbeatTimeout, c.ElectionTimeout, c.LeaderLeaseTimeout, c.CommitTimeout = t.raftHeartbeat(), t.Election, t.Lease, t.Commit
	c.SnapshotInterval, c.SnapshotThreshold, c.TrailingLogs = t.SnapshotInterval, t.SnapshotThreshold, t.TrailingLogs
	c.Logger = raftLogger(n.cfg.Logger, *n.cfg.RaftLogLevel)
	c.NoLegacyTelemetry = true
	c.ShutdownOnRemove = false // followLoop ends a removed node, saying why
	return c
}

// State returns the latest state applied here. It never blocks.
func (n *Node) State() *state.State { return n.machine.current() }

// Changed returns a channel that is closed when the next entry is applied. To
// wait for a condition take the channel first, then look at State.
func (n *Node) Changed() <-chan struct{} { return n.machine.changed.wait() }

// Done returns a channel that delivers the reason once if the node has halted:
// an unknown command, a state that differs from the other nodes', a disk that
// hangs. The process should then end. The channel is closed after that, or by
// Close.
func (n *Node) Done() <-chan error { return n.done }

// halted is called once, from anywhere, when the machine stops for good.
func (n *Node) halted(err error) {
	n.cfg.Logger.Error("the node halts", "error", err)
	n.doneOnce.Do(func() {
		n.done <- err
		close(n.done)
	})
	n.cancel()
	go func() { // Raft waits for the caller
		<-n.ready
		n.wire.hangUp()
		_ = n.stopRaft().Error()
	}()
}

// stopRaft begins to stop Raft. The future's Error waits until it has stopped
// and closes the transport.
func (n *Node) stopRaft() raft.Future {
	n.stop.Do(func() { n.stopped = n.raft.Shutdown() })
	return n.stopped
}

// Close stops the node. Proposals under way end with kms.Unknown.
func (n *Node) Close() error {
	n.cancel()
	n.doneOnce.Do(func() { close(n.done) })
	limit := time.NewTimer(n.cfg.Timing.Stall)
	defer limit.Stop()
	closed := make(chan error, 1)
	go func() {
		n.waitFutures(2 * n.cfg.Timing.Election)
		n.wire.hangUp()
		_ = n.stopRaft().Error() // always nil
		n.loops.Wait()
		closed <- n.store.Close()
	}()
	select {
	case err := <-closed:
		return err
	case <-limit.C:
		return kms.Errorf(kms.Unavailable, "the node did not stop within %v: its disk hangs", n.cfg.Timing.Stall)
	}
}

// abandon undoes a failed open.
func (n *Node) abandon() {
	n.cancel()
	n.probation.close()
	if n.wire != nil {
		_ = n.wire.Close()
	}
	if n.store != nil {
		_ = n.store.Close()
	}
}

// await returns the error of a future of Raft, or gives up with errGaveUp when ctx or
// the node ends. Close waits for what was given up, as long as Raft still answers.
func (n *Node) await(ctx context.Context, begin func() raft.Future) error {
	n.futures.Lock()
	if n.futures.closed {
		n.futures.Unlock()
		return errNotAppended
	}
	result := make(chan error, 1)
	n.futures.Go(func() { result <- begin().Error() })
	n.futures.Unlock()
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		return errGaveUp
	case <-n.ctx.Done():
		return errGaveUp
	}
}

// waitFutures refuses new futures and waits for those under way, which Raft
// answers at the latest when it loses its quorum.
func (n *Node) waitFutures(limit time.Duration) {
	n.futures.Lock()
	n.futures.closed = true
	n.futures.Unlock()
	idle := make(chan struct{})
	go func() {
		n.futures.Wait()
		close(idle)
	}()
	select {
	case <-idle:
	case <-time.After(limit):
	}
}
