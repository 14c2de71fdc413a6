package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/hashicorp/go-hclog"
	"github.com/hashicorp/raft"
	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/parallel"
	"github.com/conclave-kms/conclave/kms/state"
)

// buildSuffix marks a data directory in the making.
const buildSuffix = ".new"

// Offline is a node's data directory while the node does not run.
type Offline struct {
	NodeID  string
	DataDir string // as in Config
	Genesis state.SignedGenesis

	// Sign, SigningSuite and Signing are the node's device, as in Config. Load needs
	// none: it then verifies every statement of a snapshot.
	Sign         func(ctx context.Context, digest []byte) ([]byte, error)
	SigningSuite uint16
	Signing      []byte
}

// Found is what a data directory holds.
type Found struct {
	State *state.State
	Last  uint64 // index of the last log entry
	Term  uint64 // of that entry
}

// Load returns the state that the node had reached: its newest snapshot with every
// entry of its log after it. Entries of which the node did not know yet that they
// were committed are among them: the others may have acknowledged them, so that
// leaving them out could lose what was promised. The directory stays as it is. Errors:
// fs.ErrNotExist where there is none, kms.Unavailable while the node runs or if the
// log is damaged, and what state.Restore returns.
func (o Offline) Load(ctx context.Context) (Found, error) {
	if _, err := os.Stat(filepath.Join(o.DataDir, logFile)); err != nil {
		return Found{}, err
	}
	genesis, err := state.New(o.Genesis)
	if err != nil {
		return Found{}, err
	}
	dir := &dataDir{path: o.DataDir, id: identity{Cluster: genesis.Cluster(), Node: o.NodeID}}
	b, err := os.ReadFile(dir.file(identityFile))
	if err != nil {
		return Found{}, kms.Wrap(kms.Invalid, err, fmt.Sprintf("cannot read %s: %v", identityFile, err), "")
	}
	if err := dir.check(b); err != nil {
		return Found{}, err
	}
	path := dir.file(logFile)
	if err := checkStore(path); err != nil {
		return Found{}, err
	}
	store, err := raftboltdb.New(raftboltdb.Options{Path: path, BoltOptions: &bbolt.Options{ReadOnly: true, Timeout: lockWait}})
	if err != nil {
		return Found{}, storeError(path, err)
	}
	f, err := o.load(ctx, dir, genesis, &checkedStore{LogStore: store, path: path})
	if err = errors.Join(err, store.Close()); err != nil {
		return Found{}, err
	}
	if f.State.Lineage() != dir.lineage() {
		return Found{}, kms.Errorf(kms.Invalid, "%s is of epoch %d, its snapshots and log are of epoch %d", o.DataDir, dir.id.Epoch, f.State.Epoch())
	}
	return f, nil
}

func (o Offline) load(ctx context.Context, dir *dataDir, genesis *state.State, store LogStore) (Found, error) {
	f := Found{State: genesis}
	snapshots, err := newSnapshotStore(dir.path, hclog.NewNullLogger())
	if err != nil {
		return f, err
	}
	list, err := snapshots.List()
	if err != nil {
		return f, err
	}
	if len(list) > 0 { // the newest first
		if f.State, err = o.restore(ctx, dir, snapshots, list[0].ID); err != nil {
			return f, err
		}
		f.Last, f.Term = list[0].Index, list[0].Term
	}
	first, err := store.FirstIndex()
	if err != nil {
		return f, storeError(dir.file(logFile), err)
	}
	last, err := store.LastIndex()
	if err != nil {
		return f, storeError(dir.file(logFile), err)
	}
	if last > f.Last && first > f.Last+1 {
		return f, kms.Errorf(kms.Invalid, "the log in %s begins at entry %d, its newest snapshot ends at %d", dir.path, first, f.Last)
	}
	for i := f.Last + 1; i <= last; i++ {
		var l raft.Log
		if err := store.GetLog(i, &l); err != nil {
			return f, storeError(dir.file(logFile), err)
		}
		f.Last, f.Term = l.Index, l.Term
		if l.Type != raft.LogCommand {
			continue
		}
		next, result := f.State.Apply(l.Index, l.Data)
		if result.Halt {
			return f, kms.Errorf(kms.Internal, "log entry %d: %s; use the release that the node ran", l.Index, result.Message)
		}
		f.State = next
	}
	return f, nil
}

func (o Offline) restore(ctx context.Context, dir *dataDir, snapshots *snapshotStore, id string) (*state.State, error) {
	_, r, err := snapshots.Open(id)
	if err != nil {
		return nil, kms.Wrap(kms.Invalid, err, fmt.Sprintf("the newest snapshot in %s cannot be read: %v", dir.path, err), "")
	}
	defer r.Close()
	trust := o.trust(ctx, dir.path, dir.id.Cluster)
	return state.RestoreSpread(r, func(hash [32]byte) bool { return o.Signing != nil && trust.signed(hash) }, parallel.Do)
}

func (o Offline) trust(ctx context.Context, path, cluster string) *trust {
	return newTrust(ctx, Config{NodeID: o.NodeID, Sign: o.Sign, SigningSuite: o.SigningSuite, Signing: o.Signing},
		state.Node{SigningSuite: o.SigningSuite, Signing: o.Signing}, cluster, filepath.Join(path, trustDir))
}

// Begin makes the data directory of a node that begins with a state after a
// recovery (state.State.Recover) as its newest snapshot, and Raft's members as the
// state lists them. What was in its place is kept beside it, under the name returned
// ("" for nothing). It can be repeated after an interruption; a directory that
// is of the state's epoch already stays as it is (kms.Exists).
func (o Offline) Begin(ctx context.Context, st *state.State) (kept string, err error) {
	r, ok := st.Recovered()
	if !ok {
		return "", kms.Errorf(kms.Invalid, "a data directory is made from a state after a recovery")
	}
	id := identity{Format: 1, Cluster: st.Cluster(), Node: o.NodeID, Initialised: true, Epoch: st.Epoch(), Lineage: st.Lineage()}
	present := &dataDir{path: o.DataDir, id: identity{Cluster: id.Cluster, Node: id.Node}}
	b, err := os.ReadFile(present.file(identityFile))
	switch {
	case errors.Is(err, fs.ErrNotExist):
	case err != nil:
		return "", err
	default:
		if err := present.check(b); err != nil {
			return "", err
		}
		if present.id.Lineage == id.Lineage {
			return "", errors.Join(kms.Errorf(kms.Exists, "%s is of epoch %d already; start the node", o.DataDir, id.Epoch), os.RemoveAll(o.DataDir+buildSuffix))
		}
	}
	build := o.DataDir + buildSuffix
	if err := os.RemoveAll(build); err != nil {
		return "", err
	}
	if err := o.build(ctx, &dataDir{path: build, id: id}, st, r); err != nil {
		return "", err
	}
	return swap(o.DataDir, build, ".before-"+id.Lineage[:8])
}

// build writes a whole data directory.
func (o Offline) build(ctx context.Context, dir *dataDir, st *state.State, r state.Recovery) error {
	for _, d := range []string{dir.path, dir.file(trustDir)} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return err
		}
	}
	snapshots, err := newSnapshotStore(dir.path, hclog.NewNullLogger())
	if err != nil {
		return err
	}
	_, transport := raft.NewInmemTransport("") // to write addresses with, which are node ids
	term := epochTerm(r.Epoch)
	sink, err := snapshots.Create(raft.SnapshotVersionMax, st.Index(), term, servers(st.Members()), st.Index(), transport)
	if err != nil {
		return err
	}
	hash, err := st.SnapshotHash(sink)
	if err != nil {
		return errors.Join(err, sink.Cancel())
	}
	if err := sink.Close(); err != nil {
		return err
	}
	if err := o.trust(ctx, dir.path, dir.id.Cluster).sign(hash); err != nil {
		return err
	}
	store, err := raftboltdb.New(raftboltdb.Options{Path: dir.file(logFile), BoltOptions: &bbolt.Options{NoFreelistSync: true, FreelistType: bbolt.FreelistMapType, Timeout: lockWait}})
	if err != nil {
		return err
	}
	checked := &checkedStore{LogStore: store, path: dir.file(logFile)}
	if err := errors.Join(checked.SetUint64([]byte("CurrentTerm"), term), store.Close()); err != nil {
		return err
	}
	// What the node had promised in the history that is given up binds it to nothing.
	if err := AcceptRollback(dir.path); err != nil {
		return err
	}
	return dir.save()
}

// swap puts build in the place of path and keeps what was there under path with a
// suffix, numbered where that is taken.
func swap(path, build, suffix string) (kept string, err error) {
	if _, err := os.Lstat(path); err == nil {
		kept = path + suffix
		for i := 2; ; i++ {
			if _, err := os.Lstat(kept); errors.Is(err, fs.ErrNotExist) {
				break
			}
			kept = fmt.Sprintf("%s%s-%d", path, suffix, i)
		}
		if err := os.Rename(path, kept); err != nil {
			return "", err
		}
	}
	if err := os.Rename(build, path); err != nil {
		return kept, err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return kept, err
	}
	return kept, errors.Join(dir.Sync(), dir.Close())
}

// InUse reports whether an error of Offline says that the node runs.
func InUse(err error) bool { return errors.Is(err, bolterrors.ErrTimeout) }
