package main

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/backup"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/pqc"
)

func (a *app) backupCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "backup",
		Short: "Make, verify and restore backups of the cluster's state",
		Long: `A backup is the whole state of the cluster at one moment: keyrings and wrapped keys,
policies, custodians, proposals with everything that was signed, and the genesis
document. It holds no key in the clear: what is wrapped opens only in the nodes' own
devices. Logs of data operations (DATA_DIR/access) and configuration files are not in it.

To go on from a backup takes a recover statement that custodians of at least two
sites have signed: conclave recover --help.`,
	}
	cmd.AddCommand(a.backupCreateCommand(), a.backupVerifyCommand(), a.backupRestoreCommand())
	return cmd
}

// backupInfo is what the commands print of a backup.
type backupInfo struct {
	File    string        `json:"file"`
	Header  backup.Header `json:"header"`
	State   string        `json:"state"` // hash
	Bytes   int64         `json:"bytes"`
	Full    bool          `json:"verified,omitempty"` // every statement
	Signer  string        `json:"signer"`             // fingerprint of the node's signing key
	Counts  *stateCounts  `json:"counts,omitempty"`
	Seconds float64       `json:"seconds"`
}

type stateCounts struct {
	Nodes      int `json:"nodes"`
	Custodians int `json:"custodians"`
	Keyrings   int `json:"keyrings"`
	Keys       int `json:"keys"`
	Proposals  int `json:"proposals"`
}

func (i backupInfo) table(w io.Writer) {
	row(w, "backup", i.File)
	row(w, "cluster", i.Header.Cluster)
	row(w, "epoch", i.Header.Epoch)
	row(w, "at log index", fmt.Sprintf("%d, %d leaves, root %s", i.Header.Index, i.Header.LogSize, b64(i.Header.LogRoot)))
	row(w, "cluster time", when(time.UnixMilli(i.Header.Clock)))
	row(w, "made by", fmt.Sprintf("%s, key %s, at %s", i.Header.Node, i.Signer, when(time.UnixMilli(i.Header.Created))))
	row(w, "state", i.State)
	row(w, "size", fmt.Sprintf("%d bytes", i.Bytes))
	if c := i.Counts; c != nil {
		row(w, "holds", fmt.Sprintf("%d nodes, %d custodians, %d keyrings, %d keys, %d proposals", c.Nodes, c.Custodians, c.Keyrings, c.Keys, c.Proposals))
	}
}

func (a *app) backupCreateCommand() *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "create --out FILE",
		Short: "Fetch a backup, signed by the node that makes it",
		Long: `Fetch a backup of the state as it is now, signed by the device of the node that makes
it, and check that the file is whole. Verify it where you keep it: conclave backup verify.`,
		Args: arguments(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if out == "" {
				return usagef("--out is missing: the backup file to write")
			}
			return a.asOperator(cmd, func(ctx context.Context, c *client.Client) error {
				info, err := fetchBackup(ctx, c, out)
				if kms.KindOf(err) == kms.Unavailable {
					return kms.Wrap(kms.Unavailable, err, err.Error(), "if the cluster has lost its majority for good, stop a node and run there: conclaved backup --out FILE")
				}
				if err != nil {
					return err
				}
				return a.show(cmd, info, info.table)
			})
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "backup `FILE` to write")
	return cmd
}

// fetchBackup writes the file under another name until it is whole.
func fetchBackup(ctx context.Context, c *client.Client, out string) (info backupInfo, err error) {
	if _, err := os.Lstat(out); err == nil {
		return info, exists(out, nil)
	}
	start := time.Now()
	f, err := os.CreateTemp(filepath.Dir(out), filepath.Base(out)+".part-*") // mode 0600
	if err != nil {
		return info, err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(f.Name()) // half a backup is of no use
		}
	}()
	r, w := io.Pipe()
	scanned := make(chan error, 1)
	var summary backup.Summary
	go func() {
		var err error
		summary, err = backup.Scan(bufio.NewReaderSize(r, 1<<20))
		_ = r.CloseWithError(err) // nil: what comes after is refused by the writer
		scanned <- err
	}()
	counted := &countWriter{w: io.MultiWriter(f, w)}
	stop := tellSlowly(os.Stderr, tellEvery, func() string {
		return fmt.Sprintf("%d MiB of the backup written, %s", counted.n.Load()>>20, time.Since(start).Round(time.Second))
	})
	err = c.Backup(ctx, counted)
	stop()
	_ = w.CloseWithError(err)
	if serr := <-scanned; err == nil || errors.Is(err, serr) {
		err = serr
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		return info, err
	}
	if err := os.Link(f.Name(), out); err != nil { // refuses to replace a file
		return info, err
	}
	if err := os.Remove(f.Name()); err != nil {
		return info, err
	}
	return backupInfo{File: out, Header: summary.Header, State: hex.EncodeToString(summary.Hash), Bytes: counted.n.Load(),
		Signer: pqc.Fingerprint(summary.Header.Signing), Seconds: time.Since(start).Seconds()}, nil
}

// countWriter counts what is written; n may be looked at meanwhile.
type countWriter struct {
	w io.Writer
	n atomic.Int64
}

// Write implements io.Writer.
func (c *countWriter) Write(b []byte) (int, error) {
	n, err := c.w.Write(b)
	c.n.Add(int64(n))
	return n, err
}

// countReader counts what is read; n may be looked at meanwhile.
type countReader struct {
	r io.Reader
	n atomic.Int64
}

// Read implements io.Reader.
func (c *countReader) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.n.Add(int64(n))
	return n, err
}

// tellEvery is the time between two lines about work that takes long.
const tellEvery = 10 * time.Second

// tellSlowly writes a line every so often until it is stopped.
func tellSlowly(w io.Writer, every time.Duration, line func() string) (stop func()) {
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(every)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				fmt.Fprintln(w, visible(line()))
			case <-end:
				return
			}
		}
	}()
	return func() { close(end); <-ended }
}

func (a *app) backupVerifyCommand() *cobra.Command {
	var cluster, signer string
	cmd := &cobra.Command{
		Use:   "verify FILE --cluster ID",
		Short: "Restore a backup into a scratch state and verify all that is in it, offline",
		Long: `Restore the backup into a state of its own, without a cluster, and verify it: the
signature of the node that made it, the genesis document, and every signed statement
from the genesis on; what they give must be what the backup holds. The cluster's
identity (conclave status, or the genesis document you keep) is all that is trusted.

With --signer the statements are not verified again: that node's device is trusted to
have signed nothing but a state that it had applied.`,
		Args: arguments("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if cluster == "" {
				return usagef("--cluster is missing: the identity of the cluster that you expect; see: conclave status")
			}
			info, _, err := verifyBackup(args[0], backup.Options{Cluster: cluster, Signer: signer})
			if err != nil {
				return err
			}
			return a.show(cmd, info, func(w io.Writer) {
				info.table(w)
				if info.Full {
					row(w, "verified", "every statement, from the genesis on")
				} else {
					row(w, "verified", "the signature of the node that was named as trusted; the statements were not verified again")
				}
			})
		},
	}
	cmd.Flags().StringVar(&cluster, "cluster", "", "`ID` of the cluster, 32 hexadecimal digits")
	cmd.Flags().StringVar(&signer, "signer", "", "`FINGERPRINT` of the signing key of a node that is trusted")
	return cmd
}

// verifyBackup verifies a backup file.
func verifyBackup(path string, o backup.Options) (backupInfo, backup.Result, error) {
	start := time.Now()
	f, err := os.Open(path)
	if err != nil {
		return backupInfo{}, backup.Result{}, usageError{err}
	}
	defer f.Close()
	stat, err := f.Stat()
	if err != nil {
		return backupInfo{}, backup.Result{}, err
	}
	read := &countReader{r: f}
	stop := tellSlowly(os.Stderr, tellEvery, func() string {
		return fmt.Sprintf("verifying %s: %d of %d MiB read, %s", path, read.n.Load()>>20, stat.Size()>>20, time.Since(start).Round(time.Second))
	})
	defer stop()
	res, err := backup.Verify(bufio.NewReaderSize(read, 1<<20), o)
	if kms.KindOf(err) == kms.Invalid {
		return backupInfo{}, res, kms.Wrap(kms.BadSignature, err, fmt.Sprintf("%s does not verify: %v", path, err), "")
	}
	if err != nil {
		return backupInfo{}, res, err
	}
	st := res.State
	counts := &stateCounts{Nodes: len(st.Nodes()), Custodians: len(st.Custodians()), Proposals: len(st.Proposals())}
	for _, r := range st.Keyrings() {
		counts.Keyrings++
		counts.Keys += len(st.Keys(r.Name))
	}
	return backupInfo{File: path, Header: res.Header, State: hex.EncodeToString(res.Hash[:]), Bytes: stat.Size(), Full: res.Full,
		Signer: pqc.Fingerprint(res.Header.Signing), Counts: counts, Seconds: time.Since(start).Seconds()}, res, nil
}

func (a *app) backupRestoreCommand() *cobra.Command {
	var config, statement string
	cmd := &cobra.Command{
		Use:   "restore FILE --statement FILE [--config FILE]",
		Short: "Build a stopped node's data directory from a backup (conclaved recover)",
		Long: `Build the data directory of a node from the backup and the recover statement that
custodians have approved for it. It is done at the node, which must not run, and takes
the node's configuration and device: this runs conclaved recover, see its --help.`,
		Args: arguments("FILE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if statement == "" {
				return usagef("--statement is missing: the recover statement with the custodians' approvals; see: conclave recover --help")
			}
			daemon, err := besides("conclaved")
			if err != nil {
				return err
			}
			run := exec.CommandContext(cmd.Context(), daemon, "recover", "--config", config, "--backup", args[0], "--statement", statement)
			run.Stdin, run.Stdout, run.Stderr = cmd.InOrStdin(), cmd.OutOrStdout(), cmd.ErrOrStderr()
			if err := run.Run(); err != nil {
				return fmt.Errorf("%s recover: %w", daemon, err)
			}
			return nil
		},
	}
	cmd.Flags().StringVarP(&config, "config", "c", "conclaved.toml", "the node's configuration `FILE`")
	cmd.Flags().StringVar(&statement, "statement", "", "approved recover statement `FILE`")
	return cmd
}

// besides finds another program of this release: next to this one, else on the path.
func besides(name string) (string, error) {
	if self, err := os.Executable(); err == nil {
		if path := filepath.Join(filepath.Dir(self), name); exec.Command(path).Err == nil {
			return path, nil
		}
	}
	path, err := exec.LookPath(name)
	if err != nil {
		return "", kms.Wrap(kms.NotFound, err, name+" is neither beside this program nor on the path", "run it where it is installed, at the node")
	}
	return path, nil
}
