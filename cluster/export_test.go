package cluster

import (
	"bytes"
	"context"
	"io"
	"log/slog"
	"runtime"
	"time"

	"github.com/hashicorp/raft"
)

// Inject appends an entry to the log past every check, as a hostile leader could.
func (n *Node) Inject(raw []byte) (any, error) {
	f := n.raft.Apply(raw, time.Minute)
	if err := f.Error(); err != nil {
		return nil, err
	}
	return f.Response(), nil
}

// RemoveServer takes a server off Raft's list, as a hostile leader could.
func (n *Node) RemoveServer(id raft.ServerID) error {
	return n.raft.RemoveServer(id, 0, time.Minute).Error()
}

// Servers returns Raft's list, committed or not.
func (n *Node) Servers() []raft.Server { return n.raft.GetConfiguration().Configuration().Servers }

// VerifyLeader is Raft's own.
func (n *Node) VerifyLeader() raft.Future { return n.raft.VerifyLeader() }

// Append appends an entry to this leader's log, and waits for nothing else.
func (n *Node) Append(raw []byte) uint64 {
	before := n.raft.LastIndex()
	_ = n.raft.Apply(raw, time.Minute)
	for n.raft.LastIndex() == before && n.raft.State() == raft.Leader {
		runtime.Gosched()
	}
	return n.raft.LastIndex()
}

// AppendEntries sends another node a message of Raft, as a hostile member could.
func (n *Node) AppendEntries(to string, req *raft.AppendEntriesRequest) error {
	return n.wire.transport().AppendEntries(raft.ServerID(to), raft.ServerAddress(to), req, new(raft.AppendEntriesResponse))
}

// RequestVote asks another node for its vote, as a hostile member could.
func (n *Node) RequestVote(to string, req *raft.RequestVoteRequest) error {
	return n.wire.transport().RequestVote(raft.ServerID(to), raft.ServerAddress(to), req, new(raft.RequestVoteResponse))
}

// Position returns the term, and the index and term of the last log entry.
func (n *Node) Position() (term, index, logTerm uint64) {
	p := n.position()
	return p.Term, p.Index, p.LogTerm
}

// TransferTo hands the lead to a node.
func (n *Node) TransferTo(ctx context.Context, id string) error { return n.transferTo(ctx, id) }

// Connected returns the peers that the node has connections with.
func (n *Node) Connected() []string { return n.wire.connected() }

// TakeSnapshot makes Raft write a snapshot now.
func (n *Node) TakeSnapshot() error { return n.raft.Snapshot().Error() }

// TrustDir returns where the signatures over states are.
func (n *Node) TrustDir() string { return n.machine.trust.dir }

// FirstLogEntry returns the index of the oldest entry that is still in the log.
func (n *Node) FirstLogEntry() (uint64, error) { return n.logs.FirstIndex() }

// Stall pretends that a disk operation has begun and does not end.
func (n *Node) Stall() { n.watch.begin("writing the log") }

// SetHash makes the node answer for a log size with a wrong hash.
func (n *Node) SetHash(size uint64, sum []byte) { n.hashes.remember(size, sum) }

var _ raft.StreamLayer = (*stream)(nil)

// CompareHash judges a hash as if it were this node's own at a log size.
func (n *Node) CompareHash(ctx context.Context, size uint64, own []byte) error {
	return n.compareHashes(ctx, size, own)
}

// RestoreState gives the machine a snapshot, as Raft does.
func (n *Node) RestoreState(snapshot []byte) error {
	return n.machine.Restore(io.NopCloser(bytes.NewReader(snapshot)))
}

// LogRaft logs a message at every level as Raft would.
func LogRaft(log *slog.Logger, min slog.Level, msg string, args ...any) {
	l := raftLogger(log, min)
	l.Debug(msg, args...)
	l.Info(msg, args...)
	l.Warn(msg, args...)
	l.Error(msg, args...)
}

// Keeps reports whether this node keeps a mark of another as far as that has got.
func (n *Node) Keeps(other *Node) bool {
	return keeps(n.memory.others.of(other.cfg.NodeID), other)
}

// KeepsOnDisk is Keeps after a restart.
func (n *Node) KeepsOnDisk(other *Node) bool {
	return keeps(openPromises(n.memory.others.path, n.cfg.Logger).of(other.cfg.NodeID), other)
}

func keeps(raw []byte, other *Node) bool {
	m, err := parseMark(raw)
	return err == nil && m.At == other.position() && m.Counter == other.memory.count.value()
}

// RefusedCalls counts messages of Raft that probation has refused.
func (n *Node) RefusedCalls() uint64 { return n.probation.refused.Load() }
