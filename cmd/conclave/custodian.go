package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

func (a *app) custodianCommand() *cobra.Command {
	cmd := &cobra.Command{Use: "custodian", Short: "Make a custodian's key; list the custodians; propose to enrol or revoke one; suspend a lost key"}
	cmd.AddCommand(a.custodianKeygenCommand(), a.custodianTokenCommand(), a.custodianCardCommand(), a.custodianListCommand(), a.custodianAddCommand(),
		a.custodianAddKeyCommand(), a.custodianRemoveKeyCommand(), a.custodianSuspendCommand(), a.custodianRestoreCommand(), a.custodianRevokeCommand())
	return cmd
}

func (a *app) custodianKeygenCommand() *cobra.Command {
	var out, passFile string
	cmd := &cobra.Command{
		Use:   "keygen --out FILE",
		Short: "Make a custodian's key file (Ed25519 + ML-DSA-65), encrypted with a passphrase",
		Long: `Make a custodian's hybrid signing key. FILE holds it encrypted with a passphrase (age
format); FILE.pub holds the public key, which goes into the genesis document or a
proposal that enrols the custodian. An approval counts only if both signatures,
Ed25519 and ML-DSA-65, verify.`,
		Args: arguments(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if out == "" {
				return usagef("--out is missing: the key file to write")
			}
			for _, path := range []string{out, out + ".pub"} { // before anybody types a passphrase
				if _, err := os.Lstat(path); err == nil {
					return exists(path, nil)
				}
			}
			pass, err := passphrase(cmd, passFile, true)
			if err != nil {
				return err
			}
			defer pass.Destroy()
			key, err := pqc.GenerateHybrid(nil)
			if err != nil {
				return err
			}
			defer key.Destroy()
			encrypted, err := pqc.EncryptKeyFile(key, pass, pqc.KeyFileOptions{})
			if err != nil {
				return err
			}
			public, err := pqc.MarshalPublic(pqc.MLDSA65Ed25519, key.PublicKey())
			if err != nil {
				return err
			}
			if err := create(out, encrypted, 0o600); err != nil {
				return err
			}
			if err := create(out+".pub", public, 0o644); err != nil {
				return errors.Join(err, os.Remove(out)) // half a pair is of no use
			}
			v := struct {
				File        string `json:"file"`
				Public      string `json:"public"`
				Fingerprint string `json:"fingerprint"`
			}{out, out + ".pub", pqc.Fingerprint(key.PublicKey())}
			return a.show(cmd, v, func(w io.Writer) {
				row(w, "key file", v.File)
				row(w, "public key", v.Public)
				row(w, "fingerprint", v.Fingerprint)
			})
		},
	}
	cmd.Flags().StringVar(&out, "out", "", "key `FILE` to write; the public key goes to FILE.pub")
	cmd.Flags().StringVar(&passFile, "pass-file", "", "`FILE` with the passphrase (default: ask)")
	return cmd
}

func (a *app) custodianListCommand() *cobra.Command {
	return look(a, &cobra.Command{Use: "list", Short: "List the custodians and their keys"},
		func(ctx context.Context, c *client.Client, _ []string) ([]wire.Custodian, error) {
			return c.Custodians(ctx)
		},
		custodianTable)
}

func custodianTable(w io.Writer, list []wire.Custodian) {
	row(w, "CUSTODIAN", "SITE", "STATE", "KEY", "SUITE")
	for _, cu := range list {
		for _, cred := range cu.Credentials {
			state := "active"
			if cu.Revoked {
				state = "revoked"
			} else if cred.Suspended {
				state = "suspended"
			}
			row(w, cu.ID, cu.Site, state, cred.ID, pqc.SuiteID(cred.Suite))
		}
	}
}

// openKeyFile decrypts a custodian's key file.
func openKeyFile(cmd *cobra.Command, path, passFile string) (*pqc.HybridKey, string, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, "", kms.Wrap(kms.Invalid, err, fmt.Sprintf("custodian key: %v", err), "")
	}
	pass, err := passphrase(cmd, passFile, false)
	if err != nil {
		return nil, "", err
	}
	defer pass.Destroy()
	key, err := pqc.DecryptKeyFile(b, pass)
	switch {
	case errors.Is(err, pqc.ErrPassphrase):
		return nil, "", kms.Wrap(kms.OpenFailed, err, path+" does not open: wrong passphrase", "")
	case err != nil:
		return nil, "", kms.Wrap(kms.Invalid, err, fmt.Sprintf("%s: %v", path, err), "give the key file that conclave custodian keygen made")
	}
	return key, pqc.Fingerprint(key.PublicKey()), nil
}

// passphrase reads a passphrase from a file or asks for it on the terminal,
// twice for a new one.
func passphrase(cmd *cobra.Command, file string, isNew bool) (*secret.Bytes, error) {
	if file != "" {
		b, err := os.ReadFile(file)
		if err != nil {
			return nil, kms.Wrap(kms.Invalid, err, fmt.Sprintf("passphrase file: %v", err), "")
		}
		defer secret.Wipe(b)
		return secret.Copy(bytes.TrimRight(b, "\r\n"))
	}
	ask := func(prompt string) (*secret.Bytes, error) {
		if !term.IsTerminal(int(os.Stdin.Fd())) {
			return nil, usagef("no terminal to ask for the passphrase: give --pass-file")
		}
		fmt.Fprint(cmd.ErrOrStderr(), prompt)
		b, err := term.ReadPassword(int(os.Stdin.Fd()))
		fmt.Fprintln(cmd.ErrOrStderr())
		if err != nil {
			return nil, err
		}
		return secret.Move(b)
	}
	first, err := ask("Passphrase: ")
	if err != nil || !isNew {
		return first, err
	}
	second, err := ask("Again: ")
	if err != nil {
		first.Destroy()
		return nil, err
	}
	defer second.Destroy()
	if !first.Equal(second) {
		first.Destroy()
		return nil, usagef("the two passphrases differ")
	}
	return first, nil
}
