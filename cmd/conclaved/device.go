package main

import (
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"errors"
	"fmt"

	"github.com/conclave-kms/conclave/hsm"
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

func (c DeviceConfig) pkcs11() hsm.Config {
	return hsm.Config{URI: c.URI, PIN: c.pin, Label: c.Label, Curve: c.curve(), CallTimeout: c.CallTimeout.Duration, SoftHSMConf: c.SoftHSMConf}
}

func (c DeviceConfig) tpm() tpm.Config {
	return tpm.Config{Path: c.Path, AuthFile: c.AuthFile, Curve: c.curve(), CallTimeout: c.CallTimeout.Duration}
}

// provisionDevice makes the device keys, once in a device's life.
func provisionDevice(ctx context.Context, c DeviceConfig) error {
	if c.Type == "tpm" {
		return tpm.Provision(ctx, c.tpm())
	}
	return hsm.Provision(ctx, c.pkcs11())
}

// openDevice finds the device keys and runs the device's start-up self test.
func openDevice(ctx context.Context, c DeviceConfig) (device, error) {
	if c.Type == "tpm" {
		d, err := tpm.Open(ctx, c.tpm())
		if errors.Is(err, tpm.ErrNotProvisioned) {
			return nil, fmt.Errorf("%w; make the device keys with: conclaved init", err)
		}
		if err != nil {
			return nil, err
		}
		return d, nil
	}
	d, err := hsm.Open(ctx, c.pkcs11())
	if errors.Is(err, hsm.ErrNotProvisioned) {
		return nil, fmt.Errorf("%w; make the device keys with: conclaved init", err)
	}
	if err != nil {
		return nil, err
	}
	return d, nil
}
