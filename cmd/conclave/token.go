package main

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
)

// tokenSigner signs with a key in a PKCS#11 token.
type tokenSigner struct{ *hsm.Credential }

func (t tokenSigner) Suite() pqc.SuiteID {
	if t.Info().Curve == "P-256" {
		return pqc.ECDSAP256SHA256
	}
	return pqc.ECDSAP384SHA384
}

func (t tokenSigner) Sign(ctx context.Context, message []byte, signContext string) ([]byte, error) {
	digest, err := pqc.Digest(t.Suite(), message, []byte(signContext))
	if err != nil {
		return nil, err
	}
	sig, err := t.Credential.Sign(ctx, digest)
	return sig, tokenError(err)
}

func openToken(cmd *cobra.Command, uri, pinFile string) (tokenSigner, error) {
	return withToken(cmd, uri, pinFile, hsm.OpenCredential)
}

// withToken finds where the PIN comes from, which is never the command line, and opens.
func withToken(cmd *cobra.Command, uri, pinFile string, open func(context.Context, hsm.CredentialConfig) (*hsm.Credential, error)) (tokenSigner, error) {
	u, err := hsm.ParseCredentialURI(uri)
	if err != nil {
		return tokenSigner{}, usagef("--credential: %w", err)
	}
	cfg := hsm.CredentialConfig{URI: uri, PINFile: pinFile}
	if pinFile == "" && u.PINSource == "" {
		if cfg.PIN, err = askPIN(cmd, or(u.Token, u.Serial)); err != nil {
			return tokenSigner{}, err
		}
		defer cfg.PIN.Destroy()
	}
	c, err := open(cmd.Context(), cfg)
	if err != nil {
		return tokenSigner{}, tokenError(err)
	}
	return tokenSigner{c}, nil
}

func askPIN(cmd *cobra.Command, token string) (*secret.Bytes, error) {
	if !term.IsTerminal(int(os.Stdin.Fd())) {
		return nil, usagef("no terminal to ask for the PIN: give --pin-file, or a pin-source in the URI")
	}
	fmt.Fprintf(cmd.ErrOrStderr(), "PIN of token %q: ", token)
	b, err := term.ReadPassword(int(os.Stdin.Fd()))
	fmt.Fprintln(cmd.ErrOrStderr())
	if err != nil {
		return nil, err
	}
	return secret.Move(b)
}

// tokenError gives an error of a token the kind that the exit code comes from.
func tokenError(err error) error {
	if err == nil {
		return nil
	}
	kind := kms.Unavailable
	switch {
	case errors.Is(err, hsm.ErrPIN):
		kind = kms.OpenFailed
	case errors.Is(err, hsm.ErrInvalid), errors.Is(err, hsm.ErrModule), errors.Is(err, hsm.ErrUnsupported):
		kind = kms.Invalid
	case errors.Is(err, hsm.ErrTokenNotFound), errors.Is(err, hsm.ErrNotProvisioned):
		kind = kms.NotFound
	case errors.Is(err, hsm.ErrProvisioned):
		kind = kms.Exists
	}
	return kms.Wrap(kind, err, err.Error(), "")
}

func (a *app) custodianTokenCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "token",
		Short: "A custodian's key in a PKCS#11 token: make one, look at one, write its public key",
		Long: `A custodian can sign with an EC key (P-256 or P-384) in a PKCS#11 token, a YubiKey's PIV
slot, a smart card or SoftHSM, wherever a command takes --credential. The URI (RFC 7512)
names the token or its serial, the library (module-path), and the key by id or object:

  pkcs11:token=YubiKey%20PIV;id=%02?module-path=/usr/lib/x86_64-linux-gnu/libykcs11.so

The PIN is asked for, or read from --pin-file or the URI's pin-source; it is never part of
the command line, and one that the token refuses is not sent again. A key that wants
the PIN at every use gets it then. ECDSA alone is not safe against a quantum computer; a
key file (conclave custodian keygen) is, and it alone can hold a share of a recovery key.`,
	}
	cmd.AddCommand(a.tokenProbeCommand(), a.tokenGenerateCommand())
	return cmd
}

// tokenInfo is what the commands print of a key in a token.
type tokenInfo struct {
	Token              string `json:"token"`
	Serial             string `json:"serial"`
	Manufacturer       string `json:"manufacturer"`
	Model              string `json:"model"`
	Label              string `json:"label"`
	ID                 string `json:"id"`
	Suite              string `json:"suite"`
	Fingerprint        string `json:"fingerprint"`
	PublicFrom         string `json:"public_from"`
	Sensitive          bool   `json:"sensitive"`
	NeverExtractable   bool   `json:"never_extractable"`
	Local              bool   `json:"local"`
	AlwaysAuthenticate bool   `json:"always_authenticate"`
	Public             string `json:"public,omitempty"` // file
}

func (i tokenInfo) table(w io.Writer) {
	yes := map[bool]string{true: "yes", false: "no"}
	row(w, "token", fmt.Sprintf("%s, serial %s, %s %s", i.Token, i.Serial, i.Manufacturer, i.Model))
	row(w, "key", fmt.Sprintf("%q, id %s", i.Label, i.ID))
	row(w, "suite", i.Suite)
	row(w, "fingerprint", i.Fingerprint)
	row(w, "public key from", i.PublicFrom)
	row(w, "made in the token", yes[i.Local])
	row(w, "never leaves it", yes[i.Sensitive && i.NeverExtractable])
	row(w, "PIN at each use", yes[i.AlwaysAuthenticate])
	row(w, "signs", "yes, a signature was made and verified")
	if i.Public != "" {
		row(w, "public key", i.Public)
	}
}

// probeToken makes a signature over random bytes, verifies it, and writes the public key.
func probeToken(ctx context.Context, t tokenSigner, out string) (tokenInfo, error) {
	public := t.PublicKey()
	probe := make([]byte, 32)
	_, _ = rand.Read(probe) // crypto/rand.Read never returns an error
	const signContext = "conclave/credential-probe/v1"
	sig, err := t.Sign(ctx, probe, signContext)
	if err != nil {
		return tokenInfo{}, err
	}
	if err := pqc.Verify(t.Suite(), public, probe, []byte(signContext), sig); err != nil {
		return tokenInfo{}, kms.Wrap(kms.BadSignature, err, "the token's signature does not verify under the public key that it shows", "the public key or certificate beside the private key is another one's")
	}
	if out != "" {
		line, err := pqc.MarshalPublic(t.Suite(), public)
		if err != nil {
			return tokenInfo{}, err
		}
		if err := create(out, line, 0o644); err != nil {
			return tokenInfo{}, err
		}
	}
	i := t.Info()
	return tokenInfo{
		i.Token, i.Serial, i.Manufacturer, i.Model, i.Label, hex.EncodeToString(i.ID), t.Suite().String(), pqc.Fingerprint(public),
		i.PublicFrom, i.Sensitive, i.NeverExtractable, i.Local, i.AlwaysAuthenticate, out,
	}, nil
}

func (a *app) tokenProbeCommand() *cobra.Command {
	var uri, pinFile, out string
	cmd := &cobra.Command{
		Use:   "probe --credential URI [--out FILE.pub]",
		Short: "Show a key in a token, have it sign once, and write its public key",
		Long: `Show a key in a token and what the token says of it, and have it make a signature that is
verified here. --out writes the public key, for conclave custodian add --key or the
genesis document.`,
		Args: arguments(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if uri == "" {
				return usagef("--credential is missing: the PKCS#11 URI of the key")
			}
			t, err := openToken(cmd, uri, pinFile)
			if err != nil {
				return err
			}
			defer t.Close()
			i, err := probeToken(cmd.Context(), t, out)
			if err != nil {
				return err
			}
			return a.show(cmd, i, i.table)
		},
	}
	f := cmd.Flags()
	f.StringVar(&uri, "credential", "", "PKCS#11 `URI` of the key")
	f.StringVar(&pinFile, "pin-file", "", "`FILE` with the token's PIN (default: the URI's pin-source, or ask)")
	f.StringVar(&out, "out", "", "public key `FILE` to write")
	return cmd
}

func (a *app) tokenGenerateCommand() *cobra.Command {
	var uri, pinFile, out, curve string
	var each bool
	cmd := &cobra.Command{
		Use:   "generate --credential URI --out FILE.pub",
		Short: "Make a custodian's key in a token",
		Long: `Make an EC key in a token that never leaves it, and write its public key. The URI says
which object (label) and id it gets. For a YubiKey's PIV slots use its maker's tool
(yubico-piv-tool, ykman), then conclave custodian token probe.`,
		Example: "  conclave custodian token generate --credential 'pkcs11:token=custody;object=fr-1;id=%01?module-path=/usr/lib/softhsm/libsofthsm2.so' --pin-each-use --out fr-1.pub",
		Args:    arguments(""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if uri == "" || out == "" {
				return usagef("--credential and --out are needed: the PKCS#11 URI of the key to make, and the file for its public key")
			}
			on, ok := map[string]ecdh.Curve{"P-384": ecdh.P384(), "P-256": ecdh.P256()}[curve]
			if !ok {
				return usagef("--curve %q is not P-384 or P-256", curve)
			}
			if _, err := os.Lstat(out); err == nil { // before there is a key
				return exists(out, nil)
			}
			t, err := withToken(cmd, uri, pinFile, func(ctx context.Context, cfg hsm.CredentialConfig) (*hsm.Credential, error) {
				return hsm.GenerateCredential(ctx, cfg, on, each)
			})
			if err != nil {
				return err
			}
			defer t.Close()
			i, err := probeToken(cmd.Context(), t, out)
			if err != nil {
				return err
			}
			return a.show(cmd, i, i.table)
		},
	}
	f := cmd.Flags()
	f.StringVar(&uri, "credential", "", "PKCS#11 `URI` of the key to make, with object and id")
	f.StringVar(&pinFile, "pin-file", "", "`FILE` with the token's PIN (default: the URI's pin-source, or ask)")
	f.StringVar(&out, "out", "", "public key `FILE` to write")
	f.StringVar(&curve, "curve", "P-384", "`CURVE` of the key: P-384 or P-256")
	f.BoolVar(&each, "pin-each-use", false, "have the token want the PIN for each signature")
	return cmd
}
