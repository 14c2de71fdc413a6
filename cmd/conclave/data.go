package main

import (
	"context"
	"encoding/base64"
	"fmt"
	"io"
	"strings"

	"github.com/spf13/cobra"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

// onKey makes cmd one operation, as the service, on the key that its first
// argument names. The others are read by their names in cmd.Use: VALUE as it is,
// anything else from base64; an optional one stands in brackets.
func (a *app) onKey(cmd *cobra.Command, operate func(ctx context.Context, k client.Key, in [][]byte) error) *cobra.Command {
	_, names, _ := strings.Cut(cmd.Use, " ")
	cmd.Args = arguments(names)
	if cmd.Long == "" {
		cmd.Long = cmd.Short + "."
	}
	values := strings.Fields(strings.NewReplacer("[", "", "]", "").Replace(names))[1:]
	if len(values) > 0 {
		cmd.Long += "\n" + strings.Join(values, " and ") + inputHelp
	}
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		in := make([][]byte, len(args)-1)
		for i, arg := range args[1:] {
			b, err := input(cmd, arg)
			if err != nil {
				return err
			}
			if values[i] != "VALUE" {
				if b, err = base64.StdEncoding.DecodeString(strings.TrimSpace(string(b))); err != nil {
					return usagef("%s is not base64", values[i])
				}
			}
			in[i] = b
		}
		c, err := a.service()
		if err != nil {
			return err
		}
		defer c.Close()
		return operate(cmd.Context(), c.Key(keyPath(args[0])), in)
	}
	return cmd
}

const inputHelp = " may be @FILE, which reads a file, or -, which reads standard input."

func b64(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

// showBytes prints an answer whose one result is b, in base64.
func (a *app) showBytes(cmd *cobra.Command, answer any, b []byte) error {
	return a.show(cmd, answer, func(w io.Writer) { row(w, b64(b)) })
}

func contextFlag(cmd *cobra.Command) contextPairs {
	p := contextPairs{}
	cmd.Flags().VarP(p, "context", "c", "one pair of the encryption context, repeatable")
	return p
}

func versionFlag(cmd *cobra.Command) *uint32 {
	return cmd.Flags().Uint32("version", 0, "key version `N`, 0 for the primary")
}

func (a *app) encryptCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "encrypt KEYRING/KEY VALUE",
		Short: "Encrypt under the key's primary version; prints the ciphertext in base64",
		Long: `Encrypt up to 64 KiB under the key's primary version and print the ciphertext in base64.
The encryption context is bound to the ciphertext, is not secret, and must be given
again to decrypt.`,
		Example: "  conclave encrypt coalition/db 'hello' --context table=orders",
	}
	pairs := contextFlag(cmd)
	return a.onKey(cmd, func(ctx context.Context, k client.Key, in [][]byte) error {
		r, err := k.Encrypt(ctx, wire.EncryptRequest{Plaintext: in[0], Context: pairs})
		if err != nil {
			return err
		}
		return a.showBytes(cmd, r, r.Ciphertext)
	})
}

func (a *app) decryptCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "decrypt KEYRING/KEY CIPHERTEXT",
		Short:   "Decrypt a ciphertext or a wrapped data key; writes the plaintext as it is",
		Long:    "Decrypt a base64 ciphertext or wrapped data key and write the plaintext to standard\noutput as it is.",
		Example: "  conclave decrypt coalition/db @ciphertext --context table=orders",
	}
	pairs := contextFlag(cmd)
	return a.onKey(cmd, func(ctx context.Context, k client.Key, in [][]byte) error {
		r, err := k.Decrypt(ctx, wire.DecryptRequest{Ciphertext: in[0], Context: pairs})
		if err != nil {
			return err
		}
		if a.output == "json" {
			return a.show(cmd, r, nil)
		}
		_, err = cmd.OutOrStdout().Write(r.Plaintext)
		return err
	})
}

func (a *app) rewrapCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rewrap KEYRING/KEY CIPHERTEXT",
		Short: "Move a ciphertext or wrapped data key to the primary version, without revealing it",
	}
	pairs := contextFlag(cmd)
	return a.onKey(cmd, func(ctx context.Context, k client.Key, in [][]byte) error {
		r, err := k.Rewrap(ctx, wire.RewrapRequest{Ciphertext: in[0], Context: pairs})
		if err != nil {
			return err
		}
		return a.showBytes(cmd, r, r.Ciphertext)
	})
}

func (a *app) datakeyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "datakey KEYRING/KEY",
		Short: "Get a fresh data key, plain and wrapped",
		Long: `Get a fresh data key. Use the plaintext to encrypt, store the wrapped form beside the
data, and unwrap it later with: conclave decrypt.`,
	}
	pairs := contextFlag(cmd)
	size := cmd.Flags().Int("bytes", 32, "length `N`: 16, 32 or 64")
	wrappedOnly := cmd.Flags().Bool("wrapped-only", false, "do not return the plaintext")
	return a.onKey(cmd, func(ctx context.Context, k client.Key, _ [][]byte) error {
		req := wire.DataKeyRequest{Bytes: *size, Context: pairs}
		if *wrappedOnly {
			r, err := k.WrappedDataKey(ctx, req)
			if err != nil {
				return err
			}
			return a.show(cmd, r, func(w io.Writer) { row(w, "wrapped", b64(r.Wrapped)) })
		}
		r, err := k.DataKey(ctx, req)
		if err != nil {
			return err
		}
		return a.show(cmd, r, func(w io.Writer) {
			row(w, "plaintext", b64(r.Plaintext))
			row(w, "wrapped", b64(r.Wrapped))
		})
	})
}

func (a *app) macCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "mac KEYRING/KEY VALUE",
		Short: "Compute HMAC-SHA-256 of a message; prints base64",
	}
	return a.onKey(cmd, func(ctx context.Context, k client.Key, in [][]byte) error {
		r, err := k.MAC(ctx, wire.MACRequest{Message: in[0]})
		if err != nil {
			return err
		}
		return a.showBytes(cmd, r, r.MAC)
	})
}

func (a *app) verifyMACCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verify-mac KEYRING/KEY VALUE MAC",
		Short: "Check a MAC; exits with 6 when it does not verify",
	}
	version := versionFlag(cmd)
	return a.onKey(cmd, func(ctx context.Context, k client.Key, in [][]byte) error {
		r, err := k.VerifyMAC(ctx, wire.VerifyMACRequest{Message: in[0], MAC: in[1], KeyVersion: *version})
		return a.verdict(cmd, r, err)
	})
}

// verdict prints the answer of a verification.
func (a *app) verdict(cmd *cobra.Command, r wire.VerifyResponse, err error) error {
	if err != nil {
		return err
	}
	if err := a.show(cmd, r, func(w io.Writer) { row(w, map[bool]string{true: "valid", false: "NOT valid"}[r.Valid]) }); err != nil {
		return err
	}
	if !r.Valid {
		return kms.Errorf(kms.BadSignature, "does not verify")
	}
	return nil
}

func (a *app) signCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "sign KEYRING/KEY VALUE",
		Short: "Sign a message; prints the signature in base64 (ECDSA: ASN.1 DER)",
	}
	return a.offlineSigning(a.onKey(cmd, func(ctx context.Context, k client.Key, in [][]byte) error {
		r, err := k.Sign(ctx, wire.SignRequest{Message: in[0]})
		if err != nil {
			return err
		}
		return a.showBytes(cmd, r, r.Signature)
	}))
}

func (a *app) verifyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verify KEYRING/KEY VALUE SIGNATURE",
		Short: "Check a signature; exits with 6 when it does not verify",
	}
	version := versionFlag(cmd)
	return a.onKey(cmd, func(ctx context.Context, k client.Key, in [][]byte) error {
		r, err := k.Verify(ctx, wire.VerifyRequest{Message: in[0], Signature: in[1], KeyVersion: *version})
		return a.verdict(cmd, r, err)
	})
}

func (a *app) publicKeyCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "public-key KEYRING/KEY",
		Short: "Print the public key of a sign key (PEM)",
	}
	version := versionFlag(cmd)
	return a.onKey(cmd, func(ctx context.Context, k client.Key, _ [][]byte) error {
		r, err := k.PublicKey(ctx, *version)
		if err != nil {
			return err
		}
		return a.show(cmd, r, func(w io.Writer) { fmt.Fprint(w, r.PEM) })
	})
}

func (a *app) exportCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "export KEYRING/KEY [WRAPPED]",
		Short: "Fetch a data key or key version sealed to a fresh hybrid key, so that it never travels bare",
		Long: `Fetch a data key (give its wrapped form) or a key version (give --version), sealed with
HPKE to a hybrid post-quantum key that this command makes for the one call, and
print it in base64. Not even the TLS connection carries it bare.`,
	}
	pairs := contextFlag(cmd)
	version := cmd.Flags().Uint32("version", 0, "export version `N` of the key itself")
	suiteName := cmd.Flags().String("suite", pqc.MLKEM1024P384.String(), "KEM `SUITE` of the one-call key")
	var suite pqc.Suite
	cmd.PreRunE = func(_ *cobra.Command, args []string) error {
		if (len(args) == 2) == (*version != 0) {
			return usagef("give either WRAPPED or --version")
		}
		var ok bool
		if suite, ok = pqc.ByName(*suiteName); !ok {
			return usagef("--suite %q is not known", *suiteName)
		}
		return nil
	}
	return a.onKey(cmd, func(ctx context.Context, k client.Key, in [][]byte) error {
		req := wire.ExportRequest{Context: pairs, Version: *version}
		if len(in) == 1 {
			req.Wrapped = in[0]
		}
		recipient, err := pqc.GenerateKey(suite.ID)
		if err != nil {
			return err
		}
		defer recipient.Destroy()
		req.RecipientSuite, req.RecipientPublicKey = suite.Name, recipient.PublicKey().Bytes()
		r, err := k.Export(ctx, req)
		if err != nil {
			return err
		}
		key, err := recipient.Open([]byte(wire.ExportInfo), wire.ExportAAD(r.Cluster, r.KeyID, r.KeyVersion, r.Kind, r.Identity), r.Sealed)
		if err != nil {
			return kms.Wrap(kms.OpenFailed, err, "what the node sealed does not open", "")
		}
		defer secret.Wipe(key)
		return a.showBytes(cmd, struct {
			Key        []byte `json:"key"`
			Kind       string `json:"kind"`
			KeyVersion uint32 `json:"key_version"`
		}{key, r.Kind, r.KeyVersion}, key)
	})
}
