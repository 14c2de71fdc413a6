package contract_test

import (
	"crypto/ecdh"
	"testing"

	"github.com/conclave-kms/conclave/test/contract"
	"github.com/conclave-kms/conclave/test/fakedevice"
)

func TestFake(t *testing.T) {
	for _, c := range []struct {
		name  string
		curve ecdh.Curve
	}{{"P-384", ecdh.P384()}, {"P-256", ecdh.P256()}} {
		t.Run(c.name, func(t *testing.T) {
			d, err := fakedevice.New(c.curve)
			if err != nil {
				t.Fatal(err)
			}
			contract.Run(t, func(*testing.T) contract.Device { return d.Reopen() })
		})
	}
}
