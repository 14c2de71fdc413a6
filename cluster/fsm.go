package cluster

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/parallel"
	"github.com/conclave-kms/conclave/kms/state"
)

// machine is the FSM that Raft drives: it applies committed entries to an
// immutable state and publishes the result. Once halted it applies nothing more,
// takes no snapshot and restores none.
type machine struct {
	cluster    string
	lineage    string // of the history that this node's data is of
	onApply    func(*state.State, []byte, state.Result)
	onRestore  func(*state.State)
	onSnapshot func() error
	trust      *trust
	hashes     *hashes
	snapshots  *snapshotStore
	watch      *watch
	log        *slog.Logger

	background func(func()) // runs something that the log must not wait for

	state   atomic.Pointer[state.State]
	servers atomic.Pointer[raft.Configuration] // Raft's list as committed, at the place in the log where state is
	recent  recent
	changed signal

	halted  atomic.Bool
	once    sync.Once
	onHalt  func(error)
	applied atomic.Uint64 // entries applied since the start
	noops   atomic.Uint64 // of those, recorded without effect
}

// current returns the latest state.
func (m *machine) current() *state.State { return m.state.Load() }

// publish makes st the current state and wakes those who wait for a change.
func (m *machine) publish(st *state.State) {
	m.state.Store(st)
	m.changed.fire()
}

// halt stops the machine for good and reports err, once.
func (m *machine) halt(err error) {
	m.once.Do(func() {
		m.halted.Store(true)
		m.onHalt(err)
	})
}

// Apply implements raft.FSM. It returns a state.Result or an error.
func (m *machine) Apply(l *raft.Log) any {
	defer m.watch.begin("applying a command")()
	if m.halted.Load() {
		return errHalted
	}
	next, result := m.current().Apply(l.Index, l.Data)
	if result.Halt {
		err := kms.Errorf(kms.Internal, "halted at log entry %d: %s; install the release that the other nodes run and start again", l.Index, result.Message)
		m.halt(err)
		return errHalted
	}
	m.applied.Add(1)
	if result.Kind != 0 {
		m.noops.Add(1)
	}
	m.recent.add(l.Data, result) // before whoever waits can see the index
	m.state.Store(next)
	if m.onApply != nil {
		m.onApply(next, l.Data, result)
	}
	m.publish(next)
	m.hashes.offer(next)
	return result
}

// StoreConfiguration implements raft.ConfigurationStore: it is called in log order with
// each of Raft's lists of servers when it is committed. A list that the state does not
// call for is an attack of the leader or a damaged log: this node takes no part in it.
func (m *machine) StoreConfiguration(index uint64, c raft.Configuration) {
	if m.halted.Load() {
		return
	}
	if err := checkMembers(m.current(), c); err != nil {
		m.halt(kms.Wrap(kms.Internal, err, fmt.Sprintf("halted at log entry %d: %v", index, err), ""))
		return
	}
	m.servers.Store(&c)
}

// hasMembers reports whether Raft's committed list is that of the state's members.
func (m *machine) hasMembers(st *state.State) bool {
	c := m.servers.Load()
	return c != nil && sameServers(*c, servers(st.Members()))
}

// Snapshot implements raft.FSM.
func (m *machine) Snapshot() (raft.FSMSnapshot, error) {
	if m.halted.Load() {
		return nil, errHalted
	}
	return &snapshot{state: m.current(), trust: m.trust, log: m.log, before: m.onSnapshot, made: m.snapshots.made}, nil
}

// Restore implements raft.FSM. It replaces a state only by one that contains all
// that this node knows: a leader has no reason to send another, so it would be a
// rollback.
func (m *machine) Restore(r io.ReadCloser) error {
	defer r.Close()
	if m.halted.Load() {
		return errHalted
	}
	st, err := m.restore(r)
	var list *raft.Configuration
	if list = m.snapshots.servers(); err == nil && list != nil {
		err = checkSnapshotMembers(st, *list)
	}
	if err != nil {
		m.log.Error("refused a snapshot", "error", err)
		m.snapshots.refused()
		return err
	}
	m.publish(st)
	m.servers.Store(list)
	m.snapshots.taken()
	if m.onRestore != nil {
		m.onRestore(st)
	}
	return nil
}

func (m *machine) restore(r io.Reader) (*state.State, error) {
	verified := true
	st, err := state.RestoreSpread(r, func(hash [32]byte) bool {
		verified = m.trust.signed(hash)
		return verified
	}, parallel.Do)
	if err != nil {
		return nil, err
	}
	if st.Cluster() != m.cluster {
		return nil, kms.Errorf(kms.Invalid, "the snapshot is of cluster %s, this is %s", st.Cluster(), m.cluster)
	}
	if st.Lineage() != m.lineage {
		return nil, kms.Errorf(kms.Conflict, "the snapshot is of epoch %d of the cluster, which is not that of this node's data", st.Epoch())
	}
	if err := st.Extends(m.current()); err != nil {
		return nil, err
	}
	if !verified { // every statement in it was verified just now: say so for the next start
		m.background(func() {
			if err := m.trust.sign(st.Hash()); err != nil {
				m.log.Warn("cannot sign the hash of a verified snapshot; the next start verifies it again", "error", err)
			}
		})
	}
	return st, nil
}

// snapshot is an immutable state on its way to disk.
type snapshot struct {
	state *state.State
	trust *trust
	log   *slog.Logger

	before func() error
	made   func(id string)
}

// Persist implements raft.FSMSnapshot. Without the device's signature the
// snapshot is still good: restoring it then verifies every statement in it.
func (s *snapshot) Persist(sink raft.SnapshotSink) error {
	if s.before != nil {
		if err := s.before(); err != nil {
			return errors.Join(err, sink.Cancel())
		}
	}
	if err := s.state.Snapshot(sink); err != nil {
		return errors.Join(err, sink.Cancel())
	}
	if err := s.trust.sign(s.state.Hash()); err != nil {
		s.log.Warn("cannot sign the hash of a snapshot; restoring it verifies every statement", "error", err)
	}
	if err := sink.Close(); err != nil {
		return err
	}
	s.made(sink.ID())
	return nil
}

// Release implements raft.FSMSnapshot.
func (*snapshot) Release() {}
