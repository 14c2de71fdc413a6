package audit

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/tlog"
)

// The directory that logs are exported to; README.md says what is where.
const (
	genesisFile = "genesis.cbor"
	clusterDir  = "cluster"
	accessDir   = "access"
	commandsDir = "commands"
)

// Export brings the node's access log in an export directory to what the checkpoint,
// a signed note, says of it. Errors as for tlog.Export.
func (l *Log) Export(ctx context.Context, dir, node string, checkpoint []byte) error {
	return tlog.Export(ctx, l, filepath.Join(dir, accessDir, node), checkpoint)
}

// Export is Log.Export for the cluster log, with its commands and the signed genesis
// that they follow.
func (l *ClusterLog) Export(ctx context.Context, dir string, genesis, checkpoint []byte) error {
	if err := writeGenesis(dir, genesis); err != nil {
		return err
	}
	commands := func(w io.Writer, from uint64, n int) error {
		return l.Records(from, n, func(r Record) error { return writeCommand(w, r.Raw) })
	}
	return tlog.Export(ctx, l, filepath.Join(dir, clusterDir), checkpoint, tlog.Beside{Name: commandsDir, Write: commands})
}

// writeGenesis writes the document that everything in an export is judged by. One that
// is there must be the same.
func writeGenesis(dir string, genesis []byte) error {
	path := filepath.Join(dir, genesisFile)
	switch old, err := os.ReadFile(path); {
	case err == nil && bytes.Equal(old, genesis):
		return nil
	case err == nil:
		return kms.Errorf(kms.Conflict, "%s is of another cluster", path)
	case !errors.Is(err, fs.ErrNotExist):
		return exportFailed(err)
	}
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return exportFailed(err)
	}
	f, err := os.OpenFile(path+newSuffix, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o640)
	if err != nil {
		return exportFailed(err)
	}
	_, err = f.Write(genesis)
	err = errors.Join(err, f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(path+newSuffix, path)
	}
	if err == nil {
		err = syncDir(dir)
	}
	if err != nil {
		return exportFailed(err)
	}
	return nil
}

func exportFailed(err error) error {
	return kms.Wrap(kms.Unavailable, err, "the log cannot be exported", "check the directory's owner and free space")
}
