package contract_test

import (
	"crypto/ecdh"
	"testing"

	"github.com/conclave-kms/conclave/test/contract"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

func TestSoftTPM(t *testing.T) {
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
