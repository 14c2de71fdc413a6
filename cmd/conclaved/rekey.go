package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/tpm"
)

func rekeyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rekey",
		Short: "Prepare the replacement of this node's hardware root by another device's",
		Long: `Give this node another HSM or TPM. The present one is not needed: it may be dead.

  1. write the new device into conclaved.toml as [next_device], with the fields of [device]
     (for a second SoftHSM configuration also isolate = true: its library takes one per process)
  2. at this node:         conclaved rekey prepare     makes the keys there and writes DATA_DIR/next-node.json
  3. start the node again, so that it knows [next_device]
  4. as an operator:       conclave node rekey NODE --card next-node.json --reason TEXT --wait
  5. custodians approve, one of the node's own site among them

The other nodes then seal their copies to the new device, this node opens and checks
each of them with it, adopts it, and goes on with it. Afterwards make [next_device] the
[device]; the node starts either way.`,
	}
	cmd.AddCommand(rekeyPrepareCommand())
	return cmd
}

func rekeyPrepareCommand() *cobra.Command {
	var config, witness string
	var number uint32
	cmd := &cobra.Command{
		Use:   "prepare",
		Short: "Make this node's next hardware root in [next_device], and its card",
		Long: `Make the device keys in [next_device] where they are missing, the ML-KEM seed wrapped by
it (DATA_DIR/next-root.json), and the card of the next root (DATA_DIR/next-node.json)
with the signature by which its signing key agrees to be this node's. What exists
already is kept, so that it can be repeated.

For attested hardware, have a node of another site witness the TPM with conclaved
attest --help and next-node.json, and prepare again with --witness.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(config)
			if err != nil {
				return err
			}
			return prepareNext(cmd.Context(), cfg, number, witness, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVarP(&config, "config", "c", "conclaved.toml", "configuration file")
	cmd.Flags().StringVar(&witness, "witness", "", "`FILE` of a witness, from conclaved attest witness")
	cmd.Flags().Uint32Var(&number, "number", 0, "`N` that the root is to have (default: the next; another one only where a replacement is pending that this one is to replace)")
	return cmd
}

// prepareNext makes the next root and its card.
func prepareNext(ctx context.Context, cfg Config, number uint32, witness string, out io.Writer) error {
	if cfg.NextDevice == nil {
		return errors.New("the configuration names no next device: write it as [next_device], with the fields of [device]")
	}
	if err := cfg.devicesTogether(); err != nil {
		return err
	}
	present, err := readPresentRoot(cfg)
	if err != nil {
		return err
	}
	if number == 0 {
		number = present.Root + 1
	}
	if number <= present.Root {
		return fmt.Errorf("--number %d: this node has root number %d, the next has a higher one", number, present.Root)
	}
	signed, err := readSignedGenesis(cfg.Genesis)
	if err != nil {
		return err
	}
	p := preparation{cfg: cfg.onNext(), present: present, number: number, cluster: kms.ClusterID(signed.Genesis), witness: witness}
	c, err := p.make(ctx)
	if errors.Is(err, hsm.ErrNotProvisioned) || errors.Is(err, tpm.ErrNotProvisioned) { // no keys yet, or not all of them
		if err := provisionDevice(ctx, p.cfg.Device); err != nil {
			return fmt.Errorf("[next_device]: %w", err)
		}
		c, err = p.make(ctx)
	}
	if err != nil {
		return err
	}
	b, err := json.MarshalIndent(c, "", "  ")
	if err != nil {
		return err
	}
	if err := replaceFile(nextCardPath(cfg.DataDir), append(b, '\n'), 0o644); err != nil {
		return err
	}
	fmt.Fprintf(out, "node         %s, root number %d\ndevice       %s\nsigning key  %s\ncard         %s\n", cfg.Node, number, c.Device, pqc.Fingerprint(c.Signing), nextCardPath(cfg.DataDir))
	fmt.Fprintf(out, "\nStart the node again, so that it knows [next_device], and propose the root with:\nconclave node rekey %s --card next-node.json --reason TEXT --wait\n", cfg.Node)
	return nil
}

// devicesTogether refuses two devices that a node could not have open at once: two
// SoftHSM configurations for one library in one process.
func (c Config) devicesTogether() error {
	if c.Device.Type != "pkcs11" || c.NextDevice.Type != "pkcs11" || c.Device.isolated() || c.NextDevice.isolated() {
		return nil
	}
	confs := map[string]string{}
	for _, d := range append(c.Device.pkcs11(), c.NextDevice.pkcs11()...) {
		u, err := hsm.ParseURI(d.URI)
		if err != nil {
			return err
		}
		path := u.ModulePath
		if real, err := filepath.EvalSymlinks(path); err == nil {
			path = real
		}
		if conf, ok := confs[path]; ok && conf != d.SoftHSMConf {
			return errors.New("[next_device]: the library has another softhsm_conf in [device], and takes one per process: write isolate = true into [next_device]")
		}
		confs[path] = d.SoftHSMConf
	}
	return nil
}

// preparation is what the card of a next root, or of the first one of a node that
// joins, is made of.
type preparation struct {
	cfg     Config // of the node on its next device
	present rootFile
	number  uint32
	cluster string
	witness string
}

// make opens the next device, makes what is missing of the root, and the card.
func (p preparation) make(ctx context.Context) (c card, err error) {
	dev, err := openDevice(ctx, p.cfg.Device)
	if err != nil {
		return c, fmt.Errorf("[next_device]: %w", err)
	}
	defer func() { err = errors.Join(err, dev.Close()) }()
	own, err := fingerprint(dev)
	if err != nil {
		return c, err
	}
	if own == p.present.Signing {
		return c, fmt.Errorf("[next_device] is the device that the node has: its signing key is %s", own)
	}
	path := nextRootPath(p.cfg.DataDir)
	root, err := ensureRoot(ctx, dev, p.cfg, path, p.number)
	if err != nil {
		return c, fmt.Errorf("%w (another preparation that was given up? then remove %s)", err, path)
	}
	if err := p.renumber(path); err != nil {
		return c, err
	}
	return p.finish(ctx, dev, root, nextCardPath(p.cfg.DataDir))
}

// finish makes the card of a root, in the place of a former one at path.
func (p preparation) finish(ctx context.Context, dev device, root *keyring.Root, path string) (card, error) {
	c, err := newCard(ctx, p.cfg, dev, root)
	if err != nil {
		return c, err
	}
	// A witness has seen the attestation that the card had then: it stays.
	if former, err := readCard(path); err == nil && string(former.Signing) == string(c.Signing) && string(former.Agreement) == string(c.Agreement) {
		c.Attestation = former.Attestation
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return c, err
	}
	if p.witness != "" {
		if err := c.addWitness(p.witness); err != nil {
			return c, err
		}
	}
	return c, p.possess(ctx, dev, &c)
}

// renumber puts the number into a root file that was prepared before with another.
func (p preparation) renumber(path string) error {
	f, err := readRoot(path)
	if err != nil || f.Root == p.number {
		return err
	}
	f.Root = p.number
	return replaceFile(path, f.bytes(), os.FileMode(0o600))
}

// possess has the new signing key sign that it is to be this node's root.
func (p preparation) possess(ctx context.Context, dev device, c *card) error {
	root, err := c.nextRoot()
	if err != nil {
		return err
	}
	if err := root.Validate(); err != nil {
		return err
	}
	digest, err := pqc.Digest(pqc.SuiteID(root.SigningSuite), approval.RootMessage(p.cluster, c.Node, p.number, root), []byte(approval.RootContext))
	if err != nil {
		return err
	}
	c.Root = p.number
	if c.Possession, err = dev.Sign(ctx, digest); err != nil {
		return err
	}
	return approval.NodeParams{Root: root, Possession: c.Possession}.VerifyPossession(p.cluster, c.Node, p.number)
}

// nextRoot turns the card into what is proposed to the custodians.
func (c card) nextRoot() (approval.NodeRoot, error) {
	n, err := c.node()
	if err != nil {
		return approval.NodeRoot{}, err
	}
	return approval.NodeRoot{
		Suite: n.Suite, Agreement: n.Agreement, SigningSuite: n.SigningSuite, Signing: n.Signing, Device: n.Device,
		ImportKind: n.ImportKind, Import: n.Import, Attestation: n.Attestation,
	}, nil
}
