package main

import (
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"log/slog"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/hsm/child"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/tpm"
)

// device is everything that the parts of a node need of its hardware root.
type device interface {
	AgreementKey() *ecdh.PublicKey
	ECDH(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error)
	SigningKey() *ecdsa.PublicKey
	Sign(ctx context.Context, digest []byte) ([]byte, error)
	Wrap(ctx context.Context, aad, key []byte) ([]byte, error)
	Unwrap(ctx context.Context, aad, wrapped []byte) (*secret.Bytes, error)
	Random(ctx context.Context, b []byte) error
	Check(ctx context.Context) error
	Describe() string
	Close() error
}

func (c DeviceConfig) curve() ecdh.Curve {
	if c.Curve == "P-256" {
		return ecdh.P256()
	}
	return ecdh.P384()
}

// suites returns the KEM suite and the signing suite that go with the curve.
func (c DeviceConfig) suites() (kem, signing pqc.SuiteID) {
	if c.Curve == "P-256" {
		return pqc.MLKEM768P256, pqc.ECDSAP256SHA256
	}
	return pqc.MLKEM1024P384, pqc.ECDSAP384SHA384
}

// pkcs11 returns the configuration of each token: one, or the members of a group.
func (c DeviceConfig) pkcs11() []hsm.Config {
	base := hsm.Config{URI: c.URI, PIN: c.pin, Label: c.Label, Curve: c.curve(), CallTimeout: c.CallTimeout.Duration, SoftHSMConf: c.SoftHSMConf}
	if c.URIs == nil {
		return []hsm.Config{base}
	}
	var all []hsm.Config
	for i, u := range c.URIs {
		base.URI = u
		if c.SoftHSMConfs != nil {
			base.SoftHSMConf = c.SoftHSMConfs[i]
		}
		all = append(all, base)
	}
	return all
}

func (c DeviceConfig) tpm() tpm.Config {
	return tpm.Config{Path: c.Path, AuthFile: c.AuthFile, OwnerFile: c.OwnerFile, PCRs: c.PCRs, Curve: c.curve(), CallTimeout: c.CallTimeout.Duration}
}

// provisionDevice makes the device keys, once in a device's life. In a group it makes
// them in the first token; cloning them to the others is the vendor's business.
func provisionDevice(ctx context.Context, c DeviceConfig) error {
	if c.Type == "tpm" {
		return tpm.Provision(ctx, c.tpm())
	}
	err := hsm.Provision(ctx, c.pkcs11()[0])
	if err != nil && c.URIs != nil {
		return fmt.Errorf("the first of device.uris: %w", err)
	}
	return err
}

// openDevice finds the device keys and runs the device's start-up self test.
func openDevice(ctx context.Context, c DeviceConfig) (device, error) {
	d, err := openAny(ctx, c)
	if errors.Is(err, tpm.ErrNotProvisioned) || errors.Is(err, hsm.ErrNotProvisioned) {
		return nil, fmt.Errorf("%w; make the device keys with: conclaved init", err)
	}
	if err != nil {
		return nil, err // and not a nil pointer in an interface
	}
	return d, nil
}

func openAny(ctx context.Context, c DeviceConfig) (device, error) {
	if c.Type == "tpm" {
		return tpm.Open(ctx, c.tpm())
	}
	tokens := c.pkcs11()
	if len(tokens) == 1 {
		return c.openToken(ctx, tokens[0])
	}
	var members []hsm.Opener
	for i, t := range tokens {
		members = append(members, hsm.Opener{Name: fmt.Sprintf("%d (%s)", i+1, t.URI), Open: func(ctx context.Context) (hsm.Member, error) { return c.openToken(ctx, t) }})
	}
	return hsm.NewGroup(ctx, members, slog.Default())
}

// openToken opens one token, its library in a process of its own where the
// configuration says so.
func (c DeviceConfig) openToken(ctx context.Context, t hsm.Config) (hsm.Member, error) {
	if !c.isolated() {
		d, err := hsm.Open(ctx, t)
		if err != nil {
			return nil, err
		}
		return d, nil
	}
	// The program itself, also after its file has been replaced by an update.
	d, err := child.Open(ctx, child.Config{Command: []string{"/proc/self/exe", hsmChild}, HSM: t, Log: slog.Default()})
	if u, bad := hsm.ParseURI(t.URI); bad == nil && u.PINSource != "" && errors.Is(err, hsm.ErrPIN) {
		return nil, fmt.Errorf("%w; conclaved reads it from %s, which pin-source names", err, u.PINSource) // the other process knows no file
	}
	if err != nil {
		return nil, err
	}
	return d, nil
}
