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
	dev, err := openDevice(ctx, cfg.Device)
	if errors.Is(err, hsm.ErrNotProvisioned) || errors.Is(err, tpm.ErrNotProvisioned) {
		if err := provisionDevice(ctx, cfg.Device); err != nil {
			return err
		}
		dev, err = openDevice(ctx, cfg.Device)
	}
	if err != nil {
		return err
	}
	defer dev.Close()
	root, err := ensureRoot(ctx, dev, cfg)
	if err != nil {
		return err
	}
	c, err := newCard(cfg, dev, root)
	if err != nil {
		return err
	}
	if err := writeCard(cfg, c); err != nil {
		return err
	}
	fmt.Fprintf(out, "node         %s, site %s\ndevice       %s\nsigning key  %s\ncard         %s\n", cfg.Node, cfg.Site, dev.Describe(), pqc.Fingerprint(c.Signing), cardPath(cfg.DataDir))
	return nil
}

func ensureRoot(ctx context.Context, dev device, cfg Config) (*keyring.Root, error) {
	if _, err := os.Stat(rootPath(cfg.DataDir)); errors.Is(err, fs.ErrNotExist) {
		return makeRoot(ctx, dev, cfg)
	}
	return loadRoot(ctx, dev, cfg)
}
