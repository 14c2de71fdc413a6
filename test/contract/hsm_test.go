package contract_test

import (
	"crypto/ecdh"
	"testing"

	"github.com/conclave-kms/conclave/hsm/hsmtest"
	"github.com/conclave-kms/conclave/test/contract"
)

func TestSoftHSM(t *testing.T) {
	for _, c := range []struct {
		name  string
		curve ecdh.Curve
	}{{"P-384", ecdh.P384()}, {"P-256", ecdh.P256()}} {
		t.Run(c.name, func(t *testing.T) {
			tok := hsmtest.New(t)
			cfg := tok.Config()
			cfg.Curve = c.curve
			tok.Provision(t, cfg)
			contract.Run(t, func(t *testing.T) contract.Device { return tok.Open(t, cfg) })
		})
	}
}
