package cluster

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
)

// keepSnapshots is how many snapshots stay on disk.
const keepSnapshots = 3

// snapshotStore is raft.FileSnapshotStore, which moreover drops a received
// snapshot that the machine refused: else a leader that keeps sending bad ones
// would push the good ones out.
type snapshotStore struct {
	*raft.FileSnapshotStore
	dir string
	log hclog.Logger

	stands func(index, term uint64) // optional: told of each that the machine has made or taken

	mu      sync.Mutex
	opened  string             // last snapshot opened
	meta    *raft.SnapshotMeta // of that, nil if it could not be opened
	created map[string]position
}

func newSnapshotStore(dataDir string, logger hclog.Logger) (*snapshotStore, error) {
	files, err := raft.NewFileSnapshotStoreWithLogger(dataDir, keepSnapshots, logger)
	if err != nil {
		return nil, err
	}
	return &snapshotStore{log: logger, FileSnapshotStore: files, dir: filepath.Join(dataDir, snapshotDir), created: map[string]position{}}, nil
}

// Create implements raft.SnapshotStore.
func (s *snapshotStore) Create(version raft.SnapshotVersion, index, term uint64, configuration raft.Configuration,
	configurationIndex uint64, trans raft.Transport) (raft.SnapshotSink, error) {
	sink, err := s.FileSnapshotStore.Create(version, index, term, configuration, configurationIndex, trans)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.created[sink.ID()] = position{Index: index, LogTerm: term}
	return &checkedSink{sink, filepath.Join(s.dir, sink.ID())}, nil
}

// Open implements raft.SnapshotStore.
func (s *snapshotStore) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	meta, r, err := s.FileSnapshotStore.Open(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opened, s.meta = id, nil
	if err == nil {
		s.meta = meta
	}
	return meta, r, err
}

// servers returns Raft's list of servers in the snapshot opened last, nil for none.
func (s *snapshotStore) servers() *raft.Configuration {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.meta == nil {
		return nil
	}
	return &s.meta.Configuration
}

// made tells that the machine has written a snapshot to the end.
func (s *snapshotStore) made(id string) {
	s.mu.Lock()
	at, ok := s.created[id]
	s.mu.Unlock()
	if ok && s.stands != nil {
		s.stands(at.Index, at.LogTerm)
	}
}

// taken tells that the machine has taken the snapshot opened last for its state.
func (s *snapshotStore) taken() {
	s.mu.Lock()
	meta := s.meta
	s.mu.Unlock()
	if meta != nil && s.stands != nil {
		s.stands(meta.Index, meta.Term)
	}
}

// refused removes the snapshot opened last, if it came into being in this run.
// What was there at the start stays for people to look at.
func (s *snapshotStore) refused() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.created[s.opened]; !ok || strings.ContainsRune(s.opened, filepath.Separator) {
		return
	}
	delete(s.created, s.opened)
	_ = os.RemoveAll(filepath.Join(s.dir, s.opened)) // if it stays, the next start skips it
}
