package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/backup"
)

func backupCommand() *cobra.Command {
	var config, out string
	cmd := &cobra.Command{
		Use:   "backup --out FILE",
		Short: "Make a backup of what this node holds while it does not run",
		Long: `Make a backup from the data directory of this node, which must not run: its newest
snapshot and every entry of its log after it, signed by its device. Of a running
cluster make one with: conclave backup create.

It is for when the cluster has lost its majority: take it at the survivor whose log
goes furthest (the printed index), since what the lost nodes had acknowledged may
stand at the end of its log alone. Then see: conclave recover --help.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if out == "" {
				return errors.New("--out is missing: the backup file to write")
			}
			cfg, err := loadConfig(config)
			if err != nil {
				return err
			}
			return backupOffline(cmd.Context(), cfg, out, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVarP(&config, "config", "c", "conclaved.toml", "configuration file")
	cmd.Flags().StringVar(&out, "out", "", "backup `FILE` to write")
	return cmd
}

func backupOffline(ctx context.Context, cfg Config, out string, print io.Writer) (err error) {
	if _, err := os.Lstat(out); err == nil {
		return kms.Errorf(kms.Exists, "%s exists already and is not replaced", out)
	}
	signed, err := readSignedGenesis(cfg.Genesis)
	if err != nil {
		return err
	}
	file, err := readPresentRoot(cfg)
	if err != nil {
		return err
	}
	held, err := openPresentRoot(ctx, cfg, file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, held.close()) }()
	_, suite := held.cfg.Device.suites()
	dir := cluster.Offline{NodeID: cfg.Node, DataDir: filepath.Join(cfg.DataDir, "raft"), Genesis: signed,
		Sign: held.dev.Sign, SigningSuite: uint16(suite), Signing: held.public}
	found, err := dir.Load(ctx)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s holds no log of this node", dir.DataDir)
	}
	if err != nil {
		return err
	}
	f, err := os.OpenFile(out, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	w := bufio.NewWriterSize(f, 1<<20)
	h, err := backup.Write(ctx, w, found.State, cfg.Node, version, time.Now(), held.dev.Sign)
	if err = errors.Join(err, w.Flush(), f.Sync(), f.Close()); err != nil {
		return errors.Join(err, os.Remove(out)) // half a backup is of no use
	}
	fmt.Fprintf(print, "backup    %s\ncluster   %s, epoch %d\nat        log index %d (last entry %d, term %d), cluster time %s\n",
		out, h.Cluster, h.Epoch, h.Index, found.Last, found.Term, time.UnixMilli(h.Clock).UTC().Format(time.RFC3339))
	return nil
}

// openPresentRoot opens the device that root.json belongs to.
func openPresentRoot(ctx context.Context, cfg Config, file rootFile) (*heldRoot, error) {
	var why []error
	for _, s := range sections(cfg) {
		h, err := openSection(ctx, s, file, rootFile{})
		if err == nil {
			return h, nil
		}
		why = append(why, fmt.Errorf("[%s]: %w", s.name, err))
	}
	return nil, errors.Join(why...)
}
