package cluster

import (
	"log/slog"
	"sync"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms"
)

// committedStore is the log as Raft sees it. Raft deletes the end of the log where a leader has
// other entries, and does not look whether they were committed, which with an honest leader they
// never are. A member that claims to lead could so have every node forget what the cluster had
// acknowledged: nothing of it would be missed in a log that ends with a later term. The
// store deletes no end that begins with an entry known to be committed.
type committedStore struct {
	raft.LogStore
	committed func() uint64 // index of the last entry known to be committed
	log       *slog.Logger
	said      sync.Once
}

// DeleteRange implements raft.LogStore.
func (s *committedStore) DeleteRange(min, max uint64) error {
	last, err := s.LastIndex()
	if err != nil {
		return err
	}
	if known := s.committed(); last > 0 && max >= last && min <= known {
		s.said.Do(func() {
			s.log.Error("refused to take committed entries back out of the log for the leader; find out which member led", "from", min, "committed", known)
		})
		return kms.Errorf(kms.Conflict, "entries from %d on are not given up for the leader: up to %d they were committed", min, known)
	}
	return s.LogStore.DeleteRange(min, max)
}

// committed returns the index of the last entry that this node knows to be committed, from
// former runs as well.
func (n *Node) committed() uint64 {
	if !n.running() {
		return n.before
	}
	return max(n.before, n.applied())
}

// applied returns the index of the last entry that Raft here holds and knows to be committed.
// Raft runs.
func (n *Node) applied() uint64 { return max(n.raft.CommitIndex(), n.raft.AppliedIndex()) }

// appliedBefore takes what the caller has applied in former runs. A log that does not go so far
// was put back, or is another: then its end is not known to be committed.
func (n *Node) appliedBefore(end uint64) {
	if n.before = n.cfg.Applied; n.before > end {
		n.cfg.Logger.Error("the log ends before what this node has applied: its directory, or a part of it, was put back", "end", end, "applied", n.before)
		n.before = 0
	}
}
