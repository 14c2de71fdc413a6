package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/tpm"
)

func joinCommand() *cobra.Command {
	var config, witness, introduction string
	var number uint32
	cmd := &cobra.Command{
		Use:   "join",
		Short: "Make the hardware root of a new node, and the card with which it joins a running cluster",
		Long: `Let this machine join a running cluster as a new node.

  1. copy the signed genesis document from a node of the cluster, and write conclaved.toml
     as for any node, with a node name that was never used in this cluster
  2. at this node:         conclaved join              makes the device keys and DATA_DIR/node.json
  3. as an operator:       conclave node join --card node.json --reason TEXT --wait
  4. custodians approve, one of the node's site among them
  5. at this node:         conclaved run               it catches up, receives its copies and adopts its root
  6. to let it vote:       conclave node promote NODE --reason TEXT

What exists already is kept, so that it can be repeated. The card holds a signature by
which the new signing key agrees to be this node's, in this cluster alone. For attested
hardware, have a node of another site witness the TPM with conclaved attest --help and
node.json, and run this again with --witness.

The genesis document names the founders. Where most of them are gone or have moved, or
custodians have recovered the cluster from a backup, an operator writes down who the members are now (conclave node introduce --out FILE), and
this takes it with --introduction. It tells the node whom to let connect; what they send
it checks from the genesis on.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(config)
			if err != nil {
				return err
			}
			return prepareJoin(cmd.Context(), cfg, joining{number, witness, introduction}, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVarP(&config, "config", "c", "conclaved.toml", "configuration file")
	cmd.Flags().StringVar(&witness, "witness", "", "`FILE` of a witness, from conclaved attest witness")
	cmd.Flags().StringVar(&introduction, "introduction", "", "`FILE` that names the members, from conclave node introduce")
	cmd.Flags().Uint32Var(&number, "number", firstRoot, "`N` that the root is to have (more than 1 only where a join that was approved with another card is to be replaced)")
	return cmd
}

// joining is what the flags of conclaved join say; empty files for none.
type joining struct {
	number                uint32
	witness, introduction string
}

// prepareJoin makes the root of a node that is not in the genesis, and its card.
func prepareJoin(ctx context.Context, cfg Config, j joining, out io.Writer) error {
	if j.number < firstRoot {
		return fmt.Errorf("--number %d: roots are numbered from %d", j.number, firstRoot)
	}
	signed, err := readSignedGenesis(cfg.Genesis)
	if err != nil {
		return err
	}
	genesis, err := signed.Verify()
	if err != nil {
		return fmt.Errorf("%s: %w", cfg.Genesis, err)
	}
	if slices.ContainsFunc(genesis.Nodes, func(n state.Node) bool { return n.ID == cfg.Node }) {
		return fmt.Errorf("node %s is one of the founders in %s; a machine that joins, also one that was a node before and was set up anew, needs another name", cfg.Node, cfg.Genesis)
	}
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return err
	}
	if j.introduction != "" {
		if err := keepIntroduction(cfg, j.introduction, kms.ClusterID(signed.Genesis)); err != nil {
			return err
		}
	}
	p := preparation{cfg: cfg, number: j.number, cluster: kms.ClusterID(signed.Genesis), witness: j.witness}
	c, err := p.makeFirst(ctx)
	if errors.Is(err, hsm.ErrNotProvisioned) || errors.Is(err, tpm.ErrNotProvisioned) { // no keys yet, or not all of them
		if err := provisionDevice(ctx, cfg.Device); err != nil {
			return fmt.Errorf("[device]: %w", err)
		}
		c, err = p.makeFirst(ctx)
	}
	if err != nil {
		return err
	}
	if err := writeCard(cfg, c); err != nil {
		return err
	}
	fmt.Fprintf(out, "node         %s, site %s\ncluster      %s\ndevice       %s\nsigning key  %s\ncard         %s\n", cfg.Node, cfg.Site, p.cluster, c.Device, pqc.Fingerprint(c.Signing), cardPath(cfg.DataDir))
	fmt.Fprintf(out, "\nPropose that it joins with: conclave node join --card node.json --reason TEXT --wait\nand start it with:          conclaved run\n")
	return nil
}

// makeFirst opens the device and makes what is missing of the first root, and its
// card with proof of the signing key.
func (p preparation) makeFirst(ctx context.Context) (c card, err error) {
	dev, err := openDevice(ctx, p.cfg.Device)
	if err != nil {
		return c, fmt.Errorf("[device]: %w", err)
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	path := rootPath(p.cfg.DataDir)
	root, err := ensureRoot(ctx, dev, p.cfg, path, p.number)
	if err != nil {
		return c, err
	}
	if err := p.renumber(path); err != nil {
		return c, err
	}
	return p.finish(ctx, dev, root, cardPath(p.cfg.DataDir))
}

// join adopts the node's first root once custodians have approved it.
func (n *node) join(ctx context.Context, st *state.State) error {
	own := n.roots.own()
	r, ok := st.Replacement(n.cfg.Node)
	switch {
	case !ok:
		return nil // adopted just now
	case !slices.Equal(r.New.Signing, own.public):
		return fmt.Errorf("what was approved for node %s has signing key %s, this device holds %s: propose the card of this one with conclave node rekey, after conclaved join --number %d",
			n.cfg.Node, pqc.Fingerprint(r.New.Signing), pqc.Fingerprint(own.public), r.Root+1)
	}
	if own.file.Root != r.Root {
		if err := (preparation{number: r.Root}).renumber(rootPath(n.cfg.DataDir)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		own.file.Root = r.Root
	}
	n.log.Info("custodians have approved that this node joins; taking its hardware root into use", "root", r.Root, "device", own.dev.Describe())
	return n.runAdoption(ctx, own)
}
