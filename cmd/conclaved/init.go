package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/tpm"
)

func initCommand() *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:   "init",
		Short: "Make this node's hardware root in its device, and the node's card",
		Long: `Make the three device keys (agreement, signing, wrapping) in the HSM or TPM, the ML-KEM
seed wrapped by the device (DATA_DIR/root.json), and the node's card
(DATA_DIR/node.json), which goes into the genesis document. What exists already is
kept, so that init can be repeated after an interruption.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(config)
			if err != nil {
				return err
			}
			return initNode(cmd.Context(), cfg, cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVarP(&config, "config", "c", "conclaved.toml", "configuration file")
	return cmd
}

func initNode(ctx context.Context, cfg Config, out io.Writer) error {
	if err := os.MkdirAll(cfg.DataDir, 0o700); err != nil {
		return err
	}
	c, err := makeCard(ctx, cfg)
	if errors.Is(err, hsm.ErrNotProvisioned) || errors.Is(err, tpm.ErrNotProvisioned) { // no keys yet, or not all of them
		if err := provisionDevice(ctx, cfg.Device); err != nil {
			return fmt.Errorf("[device]: %w", err)
		}
		c, err = makeCard(ctx, cfg)
	}
	if err != nil {
		return err
	}
	if err := writeCard(cfg, c); err != nil {
		return err
	}
	fmt.Fprintf(out, "node         %s, site %s\ndevice       %s\nsigning key  %s\ncard         %s\n", cfg.Node, cfg.Site, c.Device, pqc.Fingerprint(c.Signing), cardPath(cfg.DataDir))
	return nil
}

// makeCard opens the device and makes what is missing of the root, and the card.
func makeCard(ctx context.Context, cfg Config) (card, error) {
	dev, err := openDevice(ctx, cfg.Device)
	if err != nil {
		return card{}, fmt.Errorf("[device]: %w", err)
	}
	defer dev.Close()
	root, err := ensureRoot(ctx, dev, cfg, rootPath(cfg.DataDir), firstRoot)
	if err != nil {
		return card{}, err
	}
	return newCard(ctx, cfg, dev, root)
}

// ensureRoot opens the root file at path, or makes it as that of the root of the number.
func ensureRoot(ctx context.Context, dev device, cfg Config, path string, number uint32) (*keyring.Root, error) {
	f, err := readRoot(path)
	if errors.Is(err, fs.ErrNotExist) {
		return makeRoot(ctx, dev, cfg, path, number)
	}
	if err != nil {
		return nil, err
	}
	return f.open(ctx, dev, cfg, path)
}
