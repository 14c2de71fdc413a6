package cluster

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/hashicorp/raft"
	"golang.org/x/sys/unix"

	"github.com/conclave-kms/conclave/kms"
)

// watch knows which operations of the log store and the machine are under way,
// so that one that hangs is found out. A leader whose disk hangs keeps sending
// heartbeats and blocks the whole cluster; only its end frees the others.
type watch struct {
	mu   sync.Mutex
	next uint64
	ops  map[uint64]watched
}

type watched struct {
	what  string
	since time.Time
}

func newWatch() *watch { return &watch{ops: map[uint64]watched{}} }

// begin notes the start of an operation and returns what notes its end.
func (w *watch) begin(what string) (end func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.next++
	id := w.next
	w.ops[id] = watched{what, time.Now()}
	return func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.ops, id)
	}
}

// stalled returns an error if an operation has been under way for longer than limit.
func (w *watch) stalled(limit time.Duration) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, op := range w.ops {
		if d := time.Since(op.since); d > limit {
			return kms.Errorf(kms.Unavailable, "%s has hung for %v; check the disk and start the node again", op.what, d.Round(time.Second))
		}
	}
	return nil
}

// watchedStore is a log and stable store under watch.
type watchedStore struct {
	store interface {
		raft.LogStore
		raft.StableStore
	}
	watch *watch
}

// FirstIndex implements raft.LogStore.
func (s *watchedStore) FirstIndex() (uint64, error) { return s.store.FirstIndex() }

// LastIndex implements raft.LogStore.
func (s *watchedStore) LastIndex() (uint64, error) { return s.store.LastIndex() }

// GetLog implements raft.LogStore.
func (s *watchedStore) GetLog(index uint64, log *raft.Log) error {
	defer s.watch.begin("reading the log")()
	return s.store.GetLog(index, log)
}

// StoreLog implements raft.LogStore.
func (s *watchedStore) StoreLog(log *raft.Log) error {
	defer s.watch.begin("writing the log")()
	return s.store.StoreLog(log)
}

// StoreLogs implements raft.LogStore.
func (s *watchedStore) StoreLogs(logs []*raft.Log) error {
	defer s.watch.begin("writing the log")()
	return s.store.StoreLogs(logs)
}

// DeleteRange implements raft.LogStore.
func (s *watchedStore) DeleteRange(min, max uint64) error {
	defer s.watch.begin("trimming the log")()
	return s.store.DeleteRange(min, max)
}

// Set implements raft.StableStore.
func (s *watchedStore) Set(key, val []byte) error {
	defer s.watch.begin("writing the term and vote")()
	return s.store.Set(key, val)
}

// Get implements raft.StableStore.
func (s *watchedStore) Get(key []byte) ([]byte, error) { return s.store.Get(key) }

// SetUint64 implements raft.StableStore.
func (s *watchedStore) SetUint64(key []byte, val uint64) error {
	defer s.watch.begin("writing the term and vote")()
	return s.store.SetUint64(key, val)
}

// GetUint64 implements raft.StableStore.
func (s *watchedStore) GetUint64(key []byte) (uint64, error) { return s.store.GetUint64(key) }

// minFree is the least free space in bytes of a disk below which the node takes
// no more commands: Raft panics on a full disk.
const minFree = 256 << 20

// FreeSpace returns the free and total bytes of the file system that holds dir.
func FreeSpace(dir string) (free, total uint64, err error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, 0, err
	}
	size := uint64(st.Bsize)
	return st.Bavail * size, st.Blocks * size, nil
}

// checkDisk refuses changes when the disk is nearly full or cannot be asked.
func (n *Node) checkDisk() error {
	end := n.watch.begin("asking for the free space")
	free, total, err := n.cfg.FreeSpace(n.cfg.DataDir)
	end()
	if err != nil {
		return kms.Wrap(kms.ReadOnly, err, "cannot tell how much disk space node "+n.cfg.NodeID+" has left", "check its data directory")
	}
	if need := max(total/10, minFree); free < need {
		return &kms.Error{Kind: kms.ReadOnly,
			Msg: fmt.Sprintf("node %s takes no changes: %d MiB of its disk are free, it needs %d MiB", n.cfg.NodeID, free>>20, need>>20),
			Fix: "free or add space on the file system of its data directory; it goes on by itself"}
	}
	return nil
}

// supervise looks for stalls until the node closes. It asks the disk nothing itself: it
// would hang with it.
func (n *Node) supervise(ctx context.Context) {
	n.loops.Go(func() { n.superviseDisk(ctx) })
	tick := time.NewTicker(min(n.cfg.Timing.Stall/4, time.Second))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if err := n.watch.stalled(n.cfg.Timing.Stall); err != nil {
			n.machine.halt(err)
			return
		}
	}
}

// superviseDisk looks for a filling disk until the node closes.
func (n *Node) superviseDisk(ctx context.Context) {
	var handed time.Time // when the lead was last offered to another node
	tick := time.NewTicker(min(n.cfg.Timing.Stall/4, time.Second))
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		err := n.checkDisk()
		if was := n.readOnly.Swap(err != nil); err != nil && !was {
			n.cfg.Logger.Error("the node is read-only", "error", err)
		} else if err == nil && was {
			n.cfg.Logger.Info("the node takes changes again")
		}
		if err != nil && n.raft.State() == raft.Leader && time.Since(handed) > handEvery {
			handed = time.Now()
			n.loops.Go(func() { n.handLead(ctx) })
		}
	}
}

// handEvery is the time between two attempts of a read-only leader to hand over the lead: the
// next one's disk may be full as well.
const handEvery = time.Minute

// handLead lets another node lead while this one takes no commands, so that one
// full disk does not stop the changes of the whole cluster.
func (n *Node) handLead(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, n.cfg.Timing.Propose)
	defer cancel()
	if err := n.TransferLeadership(ctx); err != nil {
		n.cfg.Logger.Warn("a read-only node leads, and no other took over: the cluster takes no changes", "error", err)
		return
	}
	n.cfg.Logger.Info("another node leads, since this one is read-only")
}
