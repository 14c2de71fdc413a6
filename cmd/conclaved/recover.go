package main

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/backup"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
)

func recoverCommand() *cobra.Command {
	var config string
	var r recovering
	cmd := &cobra.Command{
		Use:   "recover --backup FILE --statement FILE",
		Short: "Build this node's data directory from a backup that custodians have approved to go on from",
		Long: `Build the data directory of this node, which must not run, from a backup and the
recover statement for it (conclave recover --help). Every node that goes on takes the
same two files. The node needs its device: what the backup holds opens nowhere else.
Where DATA_DIR/root.json is gone it is made again from what the backup keeps of it.

What was in the data directory is kept beside it. A directory that holds more than
the backup is refused; --discard-newer gives up what came after the backup.

Without the genesis document, give --cluster: the document is written from the backup.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(config)
			if err != nil {
				return err
			}
			r.cfg, r.out = cfg, cmd.OutOrStdout()
			return r.run(cmd.Context(), time.Now())
		},
	}
	f := cmd.Flags()
	f.StringVarP(&config, "config", "c", "conclaved.toml", "configuration file")
	f.StringVar(&r.backup, "backup", "", "backup `FILE`")
	f.StringVar(&r.statement, "statement", "", "approved recover statement `FILE`")
	f.StringVar(&r.cluster, "cluster", "", "`ID` of the cluster (default: that of the configuration's genesis document)")
	f.StringVar(&r.signer, "signer", "", "`FINGERPRINT` of the signing key of a node that is trusted, to spare verifying every statement")
	f.BoolVar(&r.discard, "discard-newer", false, "give up what this node holds beyond the backup")
	return cmd
}

// recovering is one node's part in a recovery.
type recovering struct {
	cfg               Config
	backup, statement string
	cluster, signer   string
	discard           bool
	out               io.Writer
}

func (r recovering) run(ctx context.Context, now time.Time) (err error) {
	if r.backup == "" || r.statement == "" {
		return errors.New("--backup and --statement are needed; see: conclaved recover --help")
	}
	if r.cluster, err = r.clusterID(); err != nil {
		return err
	}
	fmt.Fprintf(r.out, "verifying %s; that takes minutes when it is large\n", r.backup)
	before, err := r.verify()
	if err != nil {
		return err
	}
	approved, err := os.ReadFile(r.statement)
	if err != nil {
		return err
	}
	_, p, err := approval.ParseApproved(approved)
	if err != nil {
		return fmt.Errorf("%s: %w", r.statement, err)
	}
	if err := timely(p, now); err != nil {
		return err
	}
	after, err := before.Recover(approved)
	if err != nil {
		return err
	}
	me, ok := after.Node(r.cfg.Node)
	if !ok || me.Site != r.cfg.Site {
		return fmt.Errorf("the backup has no node %s at site %s", r.cfg.Node, r.cfg.Site)
	}
	held, err := r.holdDevice(ctx, after, me)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, held.close()) }()
	_, suite := held.cfg.Device.suites()
	dir := cluster.Offline{NodeID: r.cfg.Node, DataDir: filepath.Join(r.cfg.DataDir, "raft"), Genesis: after.SignedGenesis(),
		Sign: held.dev.Sign, SigningSuite: uint16(suite), Signing: held.public}
	if err := r.notNewer(ctx, dir, before, after); err != nil {
		return err
	}
	return r.begin(ctx, dir, before, after, approved)
}

// clusterID is the identity of the cluster that the backup must be of.
func (r recovering) clusterID() (string, error) {
	signed, err := readSignedGenesis(r.cfg.Genesis)
	if errors.Is(err, fs.ErrNotExist) || err != nil && r.cluster != "" {
		if _, serr := os.Stat(r.cfg.Genesis); errors.Is(serr, fs.ErrNotExist) && r.cluster != "" {
			return r.cluster, nil
		}
	}
	if err != nil {
		return "", fmt.Errorf("%w; without it, name the cluster with --cluster", err)
	}
	id := kms.ClusterID(signed.Genesis)
	if r.cluster != "" && r.cluster != id {
		return "", fmt.Errorf("%s is the document of cluster %s, not of %s", r.cfg.Genesis, id, r.cluster)
	}
	return id, nil
}

func (r recovering) verify() (*state.State, error) {
	f, err := os.Open(r.backup)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	res, err := backup.Verify(bufio.NewReaderSize(f, 1<<20), backup.Options{Cluster: r.cluster, Signer: r.signer})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", r.backup, err)
	}
	return res.State, nil
}

// timely holds a recover statement against this computer's clock.
func timely(p approval.Proposal, now time.Time) error {
	switch ms := now.UnixMilli(); {
	case p.Created > ms+state.Window:
		return fmt.Errorf("the recover statement is dated %s, in the future: check this computer's clock", time.UnixMilli(p.Created).UTC())
	case p.Expires <= ms:
		return fmt.Errorf("the recover statement has expired at %s: have custodians approve another one", time.UnixMilli(p.Expires).UTC())
	case p.NotBefore > ms:
		return fmt.Errorf("the recover statement may be carried out from %s on", time.UnixMilli(p.NotBefore).UTC())
	}
	return nil
}

// holdDevice opens the device of the node's root in the state, and its root file,
// which is made again where it is gone.
func (r recovering) holdDevice(ctx context.Context, st *state.State, me state.Node) (*heldRoot, error) {
	var why []error
	for _, s := range sections(r.cfg) {
		h, err := r.holdSection(ctx, s, st, me)
		if err == nil {
			return h, nil
		}
		why = append(why, fmt.Errorf("[%s]: %w", s.name, err))
	}
	return nil, errors.Join(why...)
}

func (r recovering) holdSection(ctx context.Context, s section, st *state.State, me state.Node) (h *heldRoot, err error) {
	dev, err := openDevice(ctx, s.cfg.Device)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, dev.Close())
		}
	}()
	own, err := fingerprint(dev)
	if err != nil {
		return nil, err
	}
	if want := pqc.Fingerprint(me.Signing); own != want {
		return nil, fmt.Errorf("in the backup node %s has hardware root number %d with signing key %s; this device holds %s: begin with the device of that time, or without this node", me.ID, me.Root, want, own)
	}
	path := rootPath(r.cfg.DataDir)
	file, err := readRoot(path)
	if errors.Is(err, fs.ErrNotExist) {
		if file, err = r.rootFile(st, me, own); err == nil {
			if err = os.MkdirAll(r.cfg.DataDir, 0o700); err == nil {
				err = writeNew(path, file.bytes(), 0o600)
			}
		}
	}
	if err != nil {
		return nil, err
	}
	h = &heldRoot{table: s.name, cfg: s.cfg, dev: dev, file: file}
	if h.root, err = file.open(ctx, dev, s.cfg, path); err != nil {
		return nil, err
	}
	if !bytes.Equal(h.root.PublicKey().Bytes(), me.Agreement) {
		return nil, fmt.Errorf("%s holds another agreement key than the backup has for node %s: move it away, and it is made again from the backup", path, me.ID)
	}
	h.public, err = dev.SigningKey().Bytes()
	return h, err
}

// rootFile is the root file that the node has kept in the cluster's state.
func (r recovering) rootFile(st *state.State, me state.Node, signing string) (rootFile, error) {
	seed, ok := st.Seed(me.ID)
	if !ok || seed.Root != me.Root {
		return rootFile{}, fmt.Errorf("%s is gone, and the backup was made before node %s kept it in the cluster: restore the file, or begin without this node and give it a new root (conclaved rekey)", rootPath(r.cfg.DataDir), me.ID)
	}
	return rootFile{Format: 1, Suite: pqc.SuiteID(seed.Suite).String(), Wrapped: seed.Wrapped, Root: me.Root, Signing: signing}, nil
}

// notNewer refuses to give up what this node holds beyond the backup.
func (r recovering) notNewer(ctx context.Context, dir cluster.Offline, before, after *state.State) error {
	found, err := dir.Load(ctx)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil
	case cluster.InUse(err):
		return err
	case err != nil:
		fmt.Fprintf(r.out, "note: what is in %s cannot be read and is kept beside the new directory: %v\n", dir.DataDir, err)
		return nil
	case found.State.Lineage() == after.Lineage(), r.discard:
		return nil
	case found.State.Epoch() >= after.Epoch():
		return fmt.Errorf("%s is of epoch %d; the recover statement begins epoch %d: it is out of date; if custodians have decided otherwise, --discard-newer", dir.DataDir, found.State.Epoch(), after.Epoch())
	case found.State.Epoch() > before.Epoch() || found.State.Index() > before.Index():
		return fmt.Errorf("%s holds log entries up to %d, the backup ends at %d: make a backup of what is here (conclaved backup --out FILE) and have custodians approve that, or give it up with --discard-newer", dir.DataDir, found.State.Index(), before.Index())
	}
	return nil
}

// begin writes what the node starts with.
func (r recovering) begin(ctx context.Context, dir cluster.Offline, before, after *state.State, approved []byte) error {
	if _, err := os.Stat(r.cfg.Genesis); errors.Is(err, fs.ErrNotExist) {
		if err := writeNew(r.cfg.Genesis, after.SignedGenesis().Marshal(), 0o644); err != nil {
			return err
		}
	}
	logDir := filepath.Join(r.cfg.DataDir, "cluster-log")
	if err := setAside(logDir, before, after); err != nil {
		return err
	}
	kept, err := dir.Begin(ctx, after)
	if err != nil && !errors.Is(err, kms.Exists) {
		return err
	}
	if err := r.logRecovery(logDir, before, after, approved); err != nil {
		return err
	}
	if err != nil {
		fmt.Fprintf(r.out, "%v\n", err)
		return nil
	}
	var voters []string
	for _, m := range after.Members() {
		if m.Voter {
			voters = append(voters, m.ID)
		}
	}
	fmt.Fprintf(r.out, "node      %s\nepoch     %d, history %s\nfrom      log index %d\nvoters    %s\n", r.cfg.Node, after.Epoch(), after.Lineage(), before.Index(), strings.Join(voters, ", "))
	if kept != "" {
		fmt.Fprintf(r.out, "kept      %s\n", kept)
	}
	fmt.Fprintf(r.out, "\nStart the node: conclaved run\n")
	return nil
}

// setAside moves a cluster log away that goes beyond the backup, or is another one.
func setAside(dir string, before, after *state.State) error {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	log, err := audit.OpenClusterLog(dir)
	if err == nil {
		root, known := log.Root()
		same := log.Last() <= before.Index() && log.Size() <= before.LogSize() && (log.Size() < before.LogSize() || !known || bytes.Equal(root, before.LogRoot()))
		begun := log.Size() == after.LogSize() && (!known || bytes.Equal(root, after.LogRoot()))
		if err := log.Close(); err != nil {
			return err
		}
		if same || begun {
			return nil
		}
	}
	aside := dir + ".before-" + after.Lineage()[:8]
	for i := 2; ; i++ {
		if _, err := os.Lstat(aside); errors.Is(err, fs.ErrNotExist) {
			break
		}
		aside = fmt.Sprintf("%s.before-%s-%d", dir, after.Lineage()[:8], i)
	}
	if err := os.Rename(dir, aside); err != nil {
		return err
	}
	return syncDir(filepath.Dir(dir))
}

// logRecovery adds the recovery to a cluster log that holds all before it. One that
// does not gets a gap when the node starts.
func (r recovering) logRecovery(dir string, before, after *state.State, approved []byte) error {
	log, err := audit.OpenClusterLog(dir)
	if err != nil {
		return err
	}
	if root, ok := log.Root(); ok && log.Size() == before.LogSize() && bytes.Equal(root, before.LogRoot()) {
		err = log.Append(after.Index(), approved, state.RecoveryLeaf(after.Index(), after.Clock(), approved))
	}
	return errors.Join(err, log.Close())
}
