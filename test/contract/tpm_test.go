package contract_test

import (
	"crypto/ecdh"
	"fmt"
	"testing"

	"github.com/conclave-kms/conclave/test/contract"
	"github.com/conclave-kms/conclave/tpm"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

func TestSoftTPM(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		name  string
		curve ecdh.Curve
	}{{"P-384", ecdh.P384()}, {"P-256", ecdh.P256()}} {
		t.Run(c.name, func(t *testing.T) {
			p := tpmtest.New(t)
			cfg := p.Config()
			cfg.Curve = c.curve
			contract.Run(t, func(t *testing.T) contract.Device { return p.OpenIn(t, cfg) })
		})
	}
}

func TestSoftTPMHardware(t *testing.T) {
	t.Parallel()
	for _, c := range []ecdh.Curve{ecdh.P384(), ecdh.P256()} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			token := func(t *testing.T) (*tpmtest.TPM, tpm.Config) {
				p := tpmtest.New(t)
				cfg := p.Config()
				cfg.Curve = c
				return p, cfg
			}
			p, cfg := token(t)
			contract.RunHardware(t, contract.Hardware{
				Open: func(t *testing.T) contract.HardwareDevice { return p.OpenIn(t, cfg) },
				Other: func(t *testing.T) contract.HardwareDevice {
					p, cfg := token(t)
					return p.OpenIn(t, cfg)
				},
				Kind: tpm.ImportKind, WrapHMAC: tpm.WrapHMAC, WrapSigner: tpm.WrapSigner, Loaded: 8,
				Lose: func(*testing.T, contract.HardwareDevice) { p.Restart() },
			})
		})
	}
}
