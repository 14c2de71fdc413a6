package contract_test

import (
	"crypto/ecdh"
	"fmt"
	"testing"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/test/contract"
	"github.com/conclave-kms/conclave/test/fakedevice"
)

func TestFake(t *testing.T) {
	t.Parallel()
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

// TestFakeHardware runs package hsm's wrapping against the fake, with the KDF
// that SoftHSM has and with the one that it has not.
func TestFakeHardware(t *testing.T) {
	t.Parallel()
	for _, sha := range []bool{false, true} {
		for _, c := range []ecdh.Curve{ecdh.P384(), ecdh.P256()} {
			t.Run(fmt.Sprint(c, sha), func(t *testing.T) {
				open := func() *fakedevice.Device {
					d, err := fakedevice.New(c)
					if err != nil {
						t.Fatal(err)
					}
					if sha {
						d.UseSHA256KDF()
					}
					return d
				}
				contract.RunHardware(t, contract.Hardware{
					Open:  func(*testing.T) contract.HardwareDevice { return open() },
					Other: func(*testing.T) contract.HardwareDevice { return open() },
					Kind:  hsm.ImportKind, WrapHMAC: hsm.WrapHMAC, WrapSigner: hsm.WrapSigner, Loaded: 40, HMAC: true, Signer: true,
					Lose: func(_ *testing.T, d contract.HardwareDevice) { d.(*fakedevice.Device).LoseKeys() },
				})
			})
		}
	}
}
