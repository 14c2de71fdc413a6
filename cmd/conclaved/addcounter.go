package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/tpm"
)

func addCounterCommand() *cobra.Command {
	var config string
	cmd := &cobra.Command{
		Use:   "add-counter",
		Short: "Add the counter against rollback to a TPM that was provisioned without one",
		Long: `Add the counter against rollback to a TPM that was provisioned by a release that made
none. With it a node notices that its disk was put back to an older state even if the
disks of all nodes were. It needs the owner's authorisation secret and changes no key.
Start the node again afterwards.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(config)
			if err != nil {
				return err
			}
			if cfg.Device.Type != "tpm" {
				return errors.New("the device is a PKCS#11 token: it makes its counter by itself where it can")
			}
			dev, err := tpm.Open(cmd.Context(), cfg.Device.tpm()) // the keys must be there: this makes none
			if err != nil {
				return err
			}
			if err := dev.Close(); err != nil {
				return err
			}
			switch err := tpm.Provision(cmd.Context(), cfg.Device.tpm()); {
			case errors.Is(err, tpm.ErrProvisioned):
				fmt.Fprintln(cmd.OutOrStdout(), "the counter is there already")
			case err != nil:
				return err
			default:
				fmt.Fprintln(cmd.OutOrStdout(), "the counter is made")
			}
			return nil
		},
	}
	cmd.Flags().StringVarP(&config, "config", "c", "conclaved.toml", "configuration file")
	return cmd
}
