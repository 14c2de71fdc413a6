package cluster

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/conclave-kms/conclave/kms"
)

// The contents of a data directory.
const (
	identityFile = "identity.json"
	logFile      = "raft.db"
	snapshotDir  = "snapshots" // made by raft.FileSnapshotStore
	trustDir     = "trust"
)

// identity is the content of identity.json: whose data this is. Initialised is
// set once the Raft log holds the first configuration; from then on a missing log
// is a loss, never a new beginning.
type identity struct {
	Format      int    `json:"format"`
	Cluster     string `json:"cluster"`
	Node        string `json:"node"`
	Initialised bool   `json:"initialised"`
	Epoch       uint64 `json:"epoch,omitempty"`   // of the history that the data is of
	Lineage     string `json:"lineage,omitempty"` // state.State.Lineage, empty in epoch 0
}

// dataDir is a node's directory on disk.
type dataDir struct {
	path string
	id   identity
}

// openDataDir creates the directory or makes sure that it belongs to this node
// of this cluster and to nobody else on the machine.
func openDataDir(path, cluster, node string) (*dataDir, error) {
	if path == "" {
		return nil, kms.Errorf(kms.Invalid, "the data directory is missing from the configuration")
	}
	if _, err := os.Lstat(path + buildSuffix); err == nil {
		return nil, kms.Errorf(kms.Conflict, "a recovery of this node was interrupted: %s is not complete; run conclaved recover again", path+buildSuffix)
	}
	if err := os.MkdirAll(path, 0o700); err != nil {
		return nil, kms.Wrap(kms.Invalid, err, fmt.Sprintf("cannot make the data directory: %v", err), "")
	}
	if err := checkModes(path); err != nil {
		return nil, err
	}
	d := &dataDir{path: path, id: identity{Format: 1, Cluster: cluster, Node: node}}
	b, err := os.ReadFile(d.file(identityFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		if _, err := os.Lstat(d.file(logFile)); err == nil {
			return nil, kms.Errorf(kms.Conflict, "%s holds a log but no %s, so it is not known whose it is; %s", path, identityFile, storeFix)
		}
		if err := d.save(); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, kms.Wrap(kms.Invalid, err, fmt.Sprintf("cannot read %s: %v", identityFile, err), "")
	default:
		if err := d.check(b); err != nil {
			return nil, err
		}
	}
	for _, sub := range []string{snapshotDir, trustDir} {
		if err := os.MkdirAll(d.file(sub), 0o700); err != nil {
			return nil, kms.Wrap(kms.Invalid, err, fmt.Sprintf("cannot make %s: %v", sub, err), "")
		}
	}
	return d, nil
}

// check compares a stored identity with the expected one.
func (d *dataDir) check(b []byte) error {
	var id identity
	if err := json.Unmarshal(b, &id); err != nil || id.Format != 1 {
		return kms.Errorf(kms.Invalid, "%s in %s is damaged; %s", identityFile, d.path, storeFix)
	}
	if id.Cluster != d.id.Cluster {
		return kms.Errorf(kms.Conflict, "%s belongs to cluster %s by its %s, this configuration is for cluster %s; use another data directory", d.path, id.Cluster, identityFile, d.id.Cluster)
	}
	if id.Node != d.id.Node {
		return kms.Errorf(kms.Conflict, "%s belongs to node %s by its %s, this is node %s; use another data directory", d.path, id.Node, identityFile, d.id.Node)
	}
	d.id = id
	return nil
}

// introduce has a node that joins begin with the history that it was told of. Once its
// log has begun, that says what it is of.
func (d *dataDir) introduce(told Introduction) error {
	if d.id.Initialised || d.id.Epoch == told.Epoch && d.id.Lineage == told.Lineage {
		return nil
	}
	if (told.Epoch == 0) != (told.Lineage == "") {
		return kms.Errorf(kms.Invalid, "the introduction names epoch %d with lineage %q; a lineage goes with every epoch after 0", told.Epoch, told.Lineage)
	}
	d.id.Epoch, d.id.Lineage = told.Epoch, told.Lineage
	return d.save()
}

// initialised records that the log has begun.
func (d *dataDir) initialised() error {
	d.id.Initialised = true
	return d.save()
}

func (d *dataDir) save() error {
	b, err := json.MarshalIndent(d.id, "", "  ")
	if err != nil {
		panic(err) // strings and numbers
	}
	if err := writeFile(d.file(identityFile), append(b, '\n')); err != nil {
		return kms.Wrap(kms.Unavailable, err, fmt.Sprintf("cannot write %s: %v", identityFile, err), "")
	}
	return nil
}

func (d *dataDir) file(name string) string { return filepath.Join(d.path, name) }

// checkModes refuses a directory or log that others on the machine can read.
func checkModes(path string) error {
	for _, name := range []string{path, filepath.Join(path, identityFile), filepath.Join(path, logFile)} {
		info, err := os.Lstat(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return kms.Wrap(kms.Invalid, err, fmt.Sprintf("cannot look at %s: %v", name, err), "")
		}
		if name == path && !info.IsDir() || name != path && !info.Mode().IsRegular() {
			return kms.Errorf(kms.Invalid, "%s is not what it should be: a directory with regular files", name)
		}
		if perm := info.Mode().Perm(); perm&0o077 != 0 {
			return kms.Errorf(kms.Invalid, "%s has mode %#o, readable by others; run: chmod go-rwx %s", name, perm, name)
		}
	}
	return nil
}

// writeFile replaces a file so that after a crash either the old or the new
// content is there, whole.
func writeFile(path string, content []byte) error {
	tmp, err := os.CreateTemp(filepath.Dir(path), ".tmp-*") // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(tmp.Name()) // a no-op after the rename
	_, err = tmp.Write(content)
	if err = errors.Join(err, tmp.Sync(), tmp.Close()); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), path); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}
