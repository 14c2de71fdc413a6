package cluster

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms"
)

// The content of a snapshot has a checksum, in raft's meta.json, which has none itself:
// there stand the index, the term and the members with which the log goes on.
const (
	metaFile = "meta.json"
	sumFile  = "meta.sum" // SHA-256 of meta.json
)

// checkedSink writes the checksum when the snapshot stands.
type checkedSink struct {
	raft.SnapshotSink
	dir string
}

// Close implements io.Closer.
func (s *checkedSink) Close() error {
	if err := s.SnapshotSink.Close(); err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(s.dir, metaFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // already reaped for newer ones
	}
	if err != nil {
		return err
	}
	sum := sha256.Sum256(b)
	return writeFile(filepath.Join(s.dir, sumFile), sum[:])
}

// List implements raft.SnapshotStore: without those whose description is damaged.
func (s *snapshotStore) List() ([]*raft.SnapshotMeta, error) {
	all, err := s.FileSnapshotStore.List()
	if err != nil {
		return nil, err
	}
	var good []*raft.SnapshotMeta
	for _, m := range all {
		if err := s.checkMeta(m.ID); err != nil {
			s.log.Error("a snapshot is damaged and is not used", "snapshot", filepath.Join(s.dir, m.ID), "error", err)
			continue
		}
		good = append(good, m)
	}
	return good, nil
}

// checkMeta compares the description of a snapshot with its checksum. One of an older
// release, or whose writing was cut short after it stood, has none.
func (s *snapshotStore) checkMeta(id string) error {
	sum, err := os.ReadFile(filepath.Join(s.dir, id, sumFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(s.dir, id, metaFile))
	if err != nil {
		return err
	}
	if own := sha256.Sum256(b); !bytes.Equal(own[:], sum) {
		return errors.New(metaFile + " is not what was written")
	}
	return nil
}

// startRaft starts Raft. Where no snapshot is left that joins the log, because the
// newest are damaged, Raft panics; here that is an error which says where to look.
func (n *Node) startRaft(conf *raft.Config, stable raft.StableStore, snapshots raft.SnapshotStore, transport raft.Transport) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = &kms.Error{Kind: kms.Unavailable, Fix: storeFix,
				Msg: fmt.Sprintf("a snapshot in %s is missing or damaged, so that the log in %s does not go on where the last good one ends: %v",
					n.dir.file(snapshotDir), n.dir.file(logFile), r)}
		}
	}()
	n.raft, err = raft.NewRaft(conf, n.machine, &committedStore{LogStore: n.logs, committed: n.committed, log: n.cfg.Logger}, stable, snapshots, transport)
	if err != nil {
		return kms.Wrap(kms.Unavailable, err, fmt.Sprintf("cannot start from the log and the snapshots in %s: %v", n.dir.path, err), "")
	}
	return nil
}
