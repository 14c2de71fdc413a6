package main

import (
	"context"
	"crypto/ecdh"
	"crypto/rand"
	"fmt"
	"path/filepath"
	"time"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/tpm"
)

// rated is the part of a device whose rates are measured.
type rated interface {
	AgreementKey() *ecdh.PublicKey
	ECDH(ctx context.Context, peer *ecdh.PublicKey) ([]byte, error)
	Sign(ctx context.Context, digest []byte) ([]byte, error)
	Wrap(ctx context.Context, aad, key []byte) ([]byte, error)
	Unwrap(ctx context.Context, aad, wrapped []byte) (*secret.Bytes, error)
	Random(ctx context.Context, b []byte) error
	Close() error
}

// devices measures fresh devices, P-384, one caller.
func devices(ctx context.Context, dir string, span time.Duration) error {
	fmt.Printf("\n%-10s %12s %12s %12s %12s %14s\n", "device", "ECDH/s", "sign/s", "wrap/s", "unwrap/s", "random 32 B/s")
	soft, _, err := softHSM(ctx, filepath.Join(dir, "token"))
	if err != nil {
		return err
	}
	if err := rates(ctx, "SoftHSM", soft, span); err != nil {
		return err
	}
	swtpm, stop, err := softTPM(ctx, filepath.Join(dir, "tpm"))
	if err != nil {
		return err
	}
	defer stop()
	return rates(ctx, "swtpm", swtpm, span)
}

func softHSM(ctx context.Context, dir string) (*hsm.Device, *hsm.SoftToken, error) {
	pin, err := secret.Copy([]byte(rand.Text()))
	if err != nil {
		return nil, nil, err
	}
	token, err := hsm.CreateSoftToken(ctx, dir, "bench", pin)
	if err != nil {
		return nil, nil, err
	}
	cfg := hsm.Config{URI: token.URI, PIN: pin, SoftHSMConf: token.ConfFile}
	if err := hsm.Provision(ctx, cfg); err != nil {
		return nil, nil, err
	}
	d, err := hsm.Open(ctx, cfg)
	return d, token, err
}

func softTPM(ctx context.Context, dir string) (rated, func(), error) {
	if err := tpm.SetupSoftTPM(ctx, dir); err != nil {
		return nil, nil, err
	}
	s, err := tpm.StartSoftTPM(ctx, dir)
	if err != nil {
		return nil, nil, err
	}
	stop := func() { _ = s.Stop() }
	auth := filepath.Join(dir, "auth")
	cfg := tpm.Config{Path: "unix:" + s.Socket, AuthFile: auth}
	if err := tpm.NewAuthFile(auth); err != nil {
		stop()
		return nil, nil, err
	}
	if err := tpm.Provision(ctx, cfg); err != nil {
		stop()
		return nil, nil, err
	}
	d, err := tpm.Open(ctx, cfg)
	if err != nil {
		stop()
		return nil, nil, err
	}
	return d, stop, nil
}

func rates(ctx context.Context, name string, d rated, span time.Duration) error {
	defer d.Close()
	key, aad := make([]byte, 64), []byte("bench")
	wrapped, err := d.Wrap(ctx, aad, key)
	if err != nil {
		return err
	}
	fmt.Printf("%-10s", name)
	for i, f := range []func() error{
		func() error { _, err := d.ECDH(ctx, d.AgreementKey()); return err },
		func() error { _, err := d.Sign(ctx, make([]byte, 48)); return err },
		func() error { _, err := d.Wrap(ctx, aad, key); return err },
		func() error {
			s, err := d.Unwrap(ctx, aad, wrapped)
			if err == nil {
				s.Destroy()
			}
			return err
		},
		func() error { return d.Random(ctx, key[:32]) },
	} {
		n := 0
		begin := time.Now()
		for time.Since(begin) < span {
			if err := f(); err != nil {
				return fmt.Errorf("%s: %w", name, err)
			}
			n++
		}
		fmt.Printf(" %*.0f", map[bool]int{true: 14, false: 12}[i == 4], float64(n)/time.Since(begin).Seconds())
	}
	fmt.Println()
	return nil
}
