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

// onKey runs fn for the key that the first argument names, as the service.
func (a *app) onKey(cmd *cobra.Command, arg string, fn func(ctx context.Context, k client.Key) error) error {
	keyring, key, err := keyPath(arg)
	if err != nil {
		return err
	}
	c, err := a.service()
	if err != nil {
		return err
	}
	defer c.Close()
	return fn(cmd.Context(), c.Key(keyring, key))
}

func unbase64(cmd *cobra.Command, arg, what string) ([]byte, error) {
	b, err := input(cmd, arg)
	if err != nil {
		return nil, err
	}
	out, err := base64.StdEncoding.DecodeString(strings.TrimSpace(string(b)))
	if err != nil {
		return nil, usagef("%s is not base64", what)
	}
	return out, nil
}

func b64(b []byte) string { return base64.StdEncoding.EncodeToString(b) }

const inputHelp = "VALUE is taken as it is; @FILE reads a file, - reads standard input."

func (a *app) encryptCommand() *cobra.Command {
	var context_ []string
	cmd := &cobra.Command{
		Use:     "encrypt KEYRING/KEY VALUE",
		Short:   "Encrypt under the key's primary version; prints the ciphertext in base64",
		Long:    "Encrypt up to 64 KiB under the key's primary version and print the ciphertext in base64.\n" + inputHelp + "\nThe encryption context is bound to the ciphertext, is not secret, and must be given again to decrypt.",
		Example: "  conclave encrypt coalition/db 'hello' --context table=orders",
		Args:    exactly(2, "KEYRING/KEY VALUE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			plaintext, err := input(cmd, args[1])
			if err != nil {
				return err
			}
			ctxPairs, err := pairs(context_)
			if err != nil {
				return err
			}
			return a.onKey(cmd, args[0], func(ctx context.Context, k client.Key) error {
				r, err := k.Encrypt(ctx, wire.EncryptRequest{Plaintext: plaintext, Context: ctxPairs})
				if err != nil {
					return err
				}
				return a.show(cmd, r, func(w io.Writer) { row(w, b64(r.Ciphertext)) })
			})
		},
	}
	cmd.Flags().StringArrayVarP(&context_, "context", "c", nil, "NAME=VALUE of the encryption context, repeatable")
	return cmd
}

func (a *app) decryptCommand() *cobra.Command {
	var context_ []string
	cmd := &cobra.Command{
		Use:   "decrypt KEYRING/KEY CIPHERTEXT",
		Short: "Decrypt a ciphertext or a wrapped data key; writes the plaintext as it is",
		Long:  "Decrypt a base64 ciphertext or wrapped data key and write the plaintext to standard output as it is.\n" + inputHelp,
		Args:  exactly(2, "KEYRING/KEY CIPHERTEXT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ciphertext, err := unbase64(cmd, args[1], "CIPHERTEXT")
			if err != nil {
				return err
			}
			ctxPairs, err := pairs(context_)
			if err != nil {
				return err
			}
			return a.onKey(cmd, args[0], func(ctx context.Context, k client.Key) error {
				r, err := k.Decrypt(ctx, wire.DecryptRequest{Ciphertext: ciphertext, Context: ctxPairs})
				if err != nil {
					return err
				}
				if a.output == "json" {
					return a.show(cmd, r, nil)
				}
				_, err = cmd.OutOrStdout().Write(r.Plaintext)
				return err
			})
		},
	}
	cmd.Flags().StringArrayVarP(&context_, "context", "c", nil, "NAME=VALUE of the encryption context, repeatable")
	return cmd
}

func (a *app) rewrapCommand() *cobra.Command {
	var context_ []string
	cmd := &cobra.Command{
		Use:   "rewrap KEYRING/KEY CIPHERTEXT",
		Short: "Move a ciphertext or wrapped data key to the primary version, without revealing it",
		Args:  exactly(2, "KEYRING/KEY CIPHERTEXT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ciphertext, err := unbase64(cmd, args[1], "CIPHERTEXT")
			if err != nil {
				return err
			}
			ctxPairs, err := pairs(context_)
			if err != nil {
				return err
			}
			return a.onKey(cmd, args[0], func(ctx context.Context, k client.Key) error {
				r, err := k.Rewrap(ctx, wire.RewrapRequest{Ciphertext: ciphertext, Context: ctxPairs})
				if err != nil {
					return err
				}
				return a.show(cmd, r, func(w io.Writer) { row(w, b64(r.Ciphertext)) })
			})
		},
	}
	cmd.Flags().StringArrayVarP(&context_, "context", "c", nil, "NAME=VALUE of the encryption context, repeatable")
	return cmd
}

func (a *app) datakeyCommand() *cobra.Command {
	var context_ []string
	var size int
	var wrappedOnly bool
	cmd := &cobra.Command{
		Use:   "datakey KEYRING/KEY",
		Short: "Get a fresh data key, plain and wrapped",
		Long:  "Get a fresh data key. Use the plaintext to encrypt, store the wrapped form beside the data, and unwrap it later with: conclave decrypt.",
		Args:  exactly(1, "KEYRING/KEY"),
		RunE: func(cmd *cobra.Command, args []string) error {
			ctxPairs, err := pairs(context_)
			if err != nil {
				return err
			}
			req := wire.DataKeyRequest{Bytes: size, Context: ctxPairs}
			return a.onKey(cmd, args[0], func(ctx context.Context, k client.Key) error {
				if wrappedOnly {
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
		},
	}
	cmd.Flags().StringArrayVarP(&context_, "context", "c", nil, "NAME=VALUE of the encryption context, repeatable")
	cmd.Flags().IntVar(&size, "bytes", 32, "length: 16, 32 or 64")
	cmd.Flags().BoolVar(&wrappedOnly, "wrapped-only", false, "do not return the plaintext")
	return cmd
}

func (a *app) macCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "mac KEYRING/KEY VALUE",
		Short: "Compute HMAC-SHA-256 of a message; prints base64",
		Long:  "Compute HMAC-SHA-256 of a message.\n" + inputHelp,
		Args:  exactly(2, "KEYRING/KEY VALUE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			message, err := input(cmd, args[1])
			if err != nil {
				return err
			}
			return a.onKey(cmd, args[0], func(ctx context.Context, k client.Key) error {
				r, err := k.MAC(ctx, wire.MACRequest{Message: message})
				if err != nil {
					return err
				}
				return a.show(cmd, r, func(w io.Writer) { row(w, b64(r.MAC)) })
			})
		},
	}
}

func (a *app) verifyMACCommand() *cobra.Command {
	var version uint32
	cmd := &cobra.Command{
		Use:   "verify-mac KEYRING/KEY VALUE MAC",
		Short: "Check a MAC; exits with 6 when it does not verify",
		Args:  exactly(3, "KEYRING/KEY VALUE MAC"),
		RunE: func(cmd *cobra.Command, args []string) error {
			message, err := input(cmd, args[1])
			if err != nil {
				return err
			}
			mac, err := unbase64(cmd, args[2], "MAC")
			if err != nil {
				return err
			}
			return a.onKey(cmd, args[0], func(ctx context.Context, k client.Key) error {
				r, err := k.VerifyMAC(ctx, wire.VerifyMACRequest{Message: message, MAC: mac, KeyVersion: version})
				return a.verdict(cmd, r, err)
			})
		},
	}
	cmd.Flags().Uint32Var(&version, "version", 0, "key version, 0 for the primary")
	return cmd
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
	return &cobra.Command{
		Use:   "sign KEYRING/KEY VALUE",
		Short: "Sign a message; prints the signature in base64 (ECDSA: ASN.1 DER)",
		Long:  "Sign a message with the key's primary version.\n" + inputHelp,
		Args:  exactly(2, "KEYRING/KEY VALUE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			message, err := input(cmd, args[1])
			if err != nil {
				return err
			}
			return a.onKey(cmd, args[0], func(ctx context.Context, k client.Key) error {
				r, err := k.Sign(ctx, wire.SignRequest{Message: message})
				if err != nil {
					return err
				}
				return a.show(cmd, r, func(w io.Writer) { row(w, b64(r.Signature)) })
			})
		},
	}
}

func (a *app) verifyCommand() *cobra.Command {
	var version uint32
	cmd := &cobra.Command{
		Use:   "verify KEYRING/KEY VALUE SIGNATURE",
		Short: "Check a signature; exits with 6 when it does not verify",
		Args:  exactly(3, "KEYRING/KEY VALUE SIGNATURE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			message, err := input(cmd, args[1])
			if err != nil {
				return err
			}
			sig, err := unbase64(cmd, args[2], "SIGNATURE")
			if err != nil {
				return err
			}
			return a.onKey(cmd, args[0], func(ctx context.Context, k client.Key) error {
				r, err := k.Verify(ctx, wire.VerifyRequest{Message: message, Signature: sig, KeyVersion: version})
				return a.verdict(cmd, r, err)
			})
		},
	}
	cmd.Flags().Uint32Var(&version, "version", 0, "key version, 0 for the primary")
	return cmd
}

func (a *app) publicKeyCommand() *cobra.Command {
	var version uint32
	cmd := &cobra.Command{
		Use:   "public-key KEYRING/KEY",
		Short: "Print the public key of a sign key (PEM)",
		Args:  exactly(1, "KEYRING/KEY"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return a.onKey(cmd, args[0], func(ctx context.Context, k client.Key) error {
				r, err := k.PublicKey(ctx, version)
				if err != nil {
					return err
				}
				return a.show(cmd, r, func(w io.Writer) { fmt.Fprint(w, r.PEM) })
			})
		},
	}
	cmd.Flags().Uint32Var(&version, "version", 0, "key version, 0 for the primary")
	return cmd
}

func (a *app) exportCommand() *cobra.Command {
	var context_ []string
	var version uint32
	var suiteName string
	cmd := &cobra.Command{
		Use:   "export KEYRING/KEY [WRAPPED]",
		Short: "Fetch a data key or key version sealed to a fresh hybrid key, so that it never travels bare",
		Long: `Fetch a data key (give its wrapped form) or a key version (give --version), sealed with
HPKE to a hybrid post-quantum key that this command makes for the one call, and
print it in base64. Not even the TLS connection carries it bare.
` + inputHelp,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 || len(args) > 2 {
				return usagef("%s takes KEYRING/KEY [WRAPPED]; see: %s --help", cmd.CommandPath(), cmd.CommandPath())
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			ctxPairs, err := pairs(context_)
			if err != nil {
				return err
			}
			req := wire.ExportRequest{Context: ctxPairs, Version: version}
			switch {
			case len(args) == 2 && version != 0, len(args) == 1 && version == 0:
				return usagef("give either WRAPPED or --version")
			case len(args) == 2:
				if req.Wrapped, err = unbase64(cmd, args[1], "WRAPPED"); err != nil {
					return err
				}
			}
			suite, ok := pqc.ByName(suiteName)
			if !ok {
				return usagef("--suite %q is not known", suiteName)
			}
			recipient, err := pqc.GenerateKey(suite.ID)
			if err != nil {
				return err
			}
			defer recipient.Destroy()
			req.RecipientSuite, req.RecipientPublicKey = suite.Name, recipient.PublicKey().Bytes()
			return a.onKey(cmd, args[0], func(ctx context.Context, k client.Key) error {
				r, err := k.Export(ctx, req)
				if err != nil {
					return err
				}
				key, err := recipient.Open([]byte(wire.ExportInfo), wire.ExportAAD(r.Cluster, r.KeyID, r.KeyVersion, r.Kind, r.Identity), r.Sealed)
				if err != nil {
					return kms.Wrap(kms.OpenFailed, err, "what the node sealed does not open", "")
				}
				defer secret.Wipe(key)
				out := struct {
					Key        []byte `json:"key"`
					Kind       string `json:"kind"`
					KeyVersion uint32 `json:"key_version"`
				}{key, r.Kind, r.KeyVersion}
				return a.show(cmd, out, func(w io.Writer) { row(w, b64(key)) })
			})
		},
	}
	cmd.Flags().StringArrayVarP(&context_, "context", "c", nil, "NAME=VALUE of the wrapped key's encryption context, repeatable")
	cmd.Flags().Uint32Var(&version, "version", 0, "export this version of the key itself")
	cmd.Flags().StringVar(&suiteName, "suite", pqc.MLKEM1024P384.String(), "KEM suite of the one-call key")
	return cmd
}
