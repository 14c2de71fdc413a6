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

	mu      sync.Mutex
	opened  string              // last snapshot opened
	list    *raft.Configuration // its list of servers
	created map[string]bool
}

func newSnapshotStore(dataDir string, logger hclog.Logger) (*snapshotStore, error) {
	files, err := raft.NewFileSnapshotStoreWithLogger(dataDir, keepSnapshots, logger)
	if err != nil {
		return nil, err
	}
	return &snapshotStore{log: logger, FileSnapshotStore: files, dir: filepath.Join(dataDir, snapshotDir), created: map[string]bool{}}, nil
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
	s.created[sink.ID()] = true
	return &checkedSink{sink, filepath.Join(s.dir, sink.ID())}, nil
}

// Open implements raft.SnapshotStore.
func (s *snapshotStore) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	meta, r, err := s.FileSnapshotStore.Open(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.opened, s.list = id, nil
	if err == nil {
		s.list = &meta.Configuration
	}
	return meta, r, err
}

// servers returns Raft's list of servers in the snapshot opened last, nil for none.
func (s *snapshotStore) servers() *raft.Configuration {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.list
}

// refused removes the snapshot opened last, if it came into being in this run.
// What was there at the start stays for people to look at.
func (s *snapshotStore) refused() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.created[s.opened] || strings.ContainsRune(s.opened, filepath.Separator) {
		return
	}
	delete(s.created, s.opened)
	_ = os.RemoveAll(filepath.Join(s.dir, s.opened)) // if it stays, the next start skips it
}
