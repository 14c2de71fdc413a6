package main

import (
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/tpm"
)

func deviceCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "device",
		Short: "Look after this node's device",
		Long:  "Look after this node's device. What it can do, and how fast, says: conclave device --help",
	}
	cmd.AddCommand(approvePCRsCommand(), addCounterCommand())
	return cmd
}

func approvePCRsCommand() *cobra.Command {
	var config string
	var next bool
	var also []string
	cmd := &cobra.Command{
		Use:   "approve-pcrs",
		Short: "Bind the device keys in the TPM to the present values of device.pcrs",
		Long: `Bind the device keys in the TPM to the values that the registers in device.pcrs have
now, in the place of what was approved before. Run it after an update of firmware or
boot loader, once you trust what runs. It needs the owner's authorisation secret.

Before a planned update, give the values that it will bring with --also, so that both
the present and the coming values open: lines such as "7 : 0x3D45..." for every
register in device.pcrs, as tpm2_pcrread prints the SHA-256 bank.`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := loadConfig(config)
			if err != nil {
				return err
			}
			if next {
				if cfg.NextDevice == nil {
					return errors.New("the configuration has no [next_device]")
				}
				cfg = cfg.onNext()
			}
			if cfg.Device.Type != "tpm" {
				return errors.New("the device is a PKCS#11 token: only the keys in a TPM are bound to registers")
			}
			if len(cfg.Device.PCRs) == 0 {
				return errors.New("device.pcrs names no registers: the keys of this device are not bound to any")
			}
			var sets []map[int][]byte
			for _, path := range also {
				b, err := os.ReadFile(path)
				if err != nil {
					return err
				}
				set, err := parsePCRs(string(b), cfg.Device.PCRs)
				if err != nil {
					return fmt.Errorf("%s: %w", path, err)
				}
				sets = append(sets, set)
			}
			if err := tpm.UpdatePCRPolicy(cmd.Context(), cfg.Device.tpm(), sets...); err != nil {
				return err
			}
			fmt.Fprintf(cmd.OutOrStdout(), "approved: the present values of PCRs %v, and %d other sets\n", cfg.Device.PCRs, len(sets))
			return nil
		},
	}
	cmd.Flags().StringVarP(&config, "config", "c", "conclaved.toml", "configuration file")
	cmd.Flags().BoolVar(&next, "next", false, "the TPM of [next_device] in place of that of [device]")
	cmd.Flags().StringArrayVar(&also, "also", nil, "`FILE` with values to approve besides; may be repeated")
	return cmd
}

// parsePCRs reads "REGISTER : 0xVALUE" lines of the SHA-256 bank and returns the
// wanted registers, all of which must be there.
func parsePCRs(text string, wanted []int) (map[int][]byte, error) {
	values := map[int][]byte{}
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line == "sha256:" {
			continue
		}
		number, value, ok := strings.Cut(line, ":")
		n, err := strconv.Atoi(strings.TrimSpace(number))
		if !ok || err != nil || n < 0 || n > 23 || values[n] != nil {
			return nil, fmt.Errorf("line %d is not REGISTER : 0xVALUE, each register once", i+1)
		}
		v, err := hex.DecodeString(strings.TrimPrefix(strings.ToLower(strings.TrimSpace(value)), "0x"))
		if err != nil || len(v) != 32 {
			return nil, fmt.Errorf("line %d: the value of register %d is not one of the SHA-256 bank, 64 hexadecimal digits", i+1, n)
		}
		values[n] = v
	}
	set := map[int][]byte{}
	for _, n := range wanted {
		if values[n] == nil {
			return nil, fmt.Errorf("register %d, which device.pcrs names, is missing", n)
		}
		set[n] = values[n]
	}
	return set, nil
}
