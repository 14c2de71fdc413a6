package contract_test

import (
	"crypto/ecdh"
	"fmt"
	"testing"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/hsm/hsmtest"
	"github.com/conclave-kms/conclave/test/contract"
	"github.com/miekg/pkcs11"
)

func TestSoftHSM(t *testing.T) {
	t.Parallel()
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

func TestSoftHSMHardware(t *testing.T) {
	t.Parallel()
	for _, c := range []ecdh.Curve{ecdh.P384(), ecdh.P256()} {
		t.Run(fmt.Sprint(c), func(t *testing.T) {
			token := func(t *testing.T) (*hsmtest.Token, hsm.Config) {
				tok := hsmtest.New(t)
				cfg := tok.Config()
				cfg.Curve, cfg.MaxLoaded = c, 16
				tok.Provision(t, cfg)
				return tok, cfg
			}
			tok, cfg := token(t)
			contract.RunHardware(t, contract.Hardware{
				Open: func(t *testing.T) contract.HardwareDevice { return tok.Open(t, cfg) },
				Other: func(t *testing.T) contract.HardwareDevice {
					tok, cfg := token(t)
					return tok.Open(t, cfg)
				},
				Kind: hsm.ImportKind, WrapHMAC: hsm.WrapHMAC, WrapSigner: hsm.WrapSigner, Loaded: 40, HMAC: true, Signer: true,
				Lose: func(t *testing.T, _ contract.HardwareDevice) { closeAllSessions(t, tok) },
			})
		})
	}
}

// closeAllSessions ends the sessions behind the device's back: loading a library
// that is loaded already gives the same one.
func closeAllSessions(t *testing.T, tok *hsmtest.Token) {
	t.Helper()
	u, err := hsm.ParseURI(tok.URI)
	if err != nil {
		t.Fatal(err)
	}
	p11 := pkcs11.New(u.ModulePath)
	if p11 == nil {
		t.Fatal("the library cannot be loaded")
	}
	defer p11.Destroy() // counts the library down; it stays loaded
	slots, err := p11.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	for _, slot := range slots {
		if err := p11.CloseAllSessions(slot); err != nil {
			t.Fatal(err)
		}
	}
}
