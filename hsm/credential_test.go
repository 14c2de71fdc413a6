package hsm_test

import (
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/hsm/hsmtest"
)

// credentialAt is the configuration of a custodian's key in a token.
func credentialAt(tok *hsmtest.Token, object, id string) hsm.CredentialConfig {
	path, query, _ := strings.Cut(tok.URI, "?")
	return hsm.CredentialConfig{URI: path + ";object=" + object + ";id=" + id + ";type=private?" + query, PINFile: tok.PINFile, SoftHSMConf: tok.ConfFile}
}

// digestSize is the length of what the key signs.
func digestSize(c *hsm.Credential) int {
	return map[string]int{"P-256": 32, "P-384": 48}[c.Info().Curve]
}

// signs makes a signature of a random digest and verifies it with crypto/ecdsa.
func signs(t *testing.T, c *hsm.Credential) {
	t.Helper()
	digest := make([]byte, digestSize(c))
	_, _ = rand.Read(digest) // crypto/rand.Read never returns an error
	sig, err := c.Sign(t.Context(), digest)
	if err != nil {
		t.Fatal(err)
	}
	curve := map[int]elliptic.Curve{32: elliptic.P256(), 48: elliptic.P384()}[len(digest)]
	key, err := ecdsa.ParseUncompressedPublicKey(curve, c.PublicKey())
	if err != nil {
		t.Fatal(err)
	}
	n := len(sig) / 2
	if len(sig) != 2*len(digest) || !ecdsa.Verify(key, digest, new(big.Int).SetBytes(sig[:n]), new(big.Int).SetBytes(sig[n:])) {
		t.Error("the token's signature does not verify")
	}
}

// TestCredential makes custodians' keys in a SoftHSM token, on both curves, with and
// without the PIN at each signature, and finds and uses them again.
func TestCredential(t *testing.T) {
	tok := hsmtest.New(t)
	for _, x := range []struct {
		object, id string
		curve      ecdh.Curve
		each       bool
	}{{"piv-9a", "%01", ecdh.P256(), false}, {"piv-9c", "%02", ecdh.P256(), true}, {"custodian%20de-1", "%03%FF", nil, true}} {
		cfg := credentialAt(tok, x.object, x.id)
		made, err := hsm.GenerateCredential(t.Context(), cfg, x.curve, x.each)
		if err != nil {
			t.Fatal(err)
		}
		signs(t, made)
		public := made.PublicKey()
		if err := made.Close(); err != nil {
			t.Fatal(err)
		}
		if _, err := hsm.GenerateCredential(t.Context(), cfg, x.curve, x.each); !errors.Is(err, hsm.ErrProvisioned) {
			t.Errorf("over a key that is there: %v", err)
		}
		c, err := hsm.OpenCredential(t.Context(), cfg)
		if err != nil {
			t.Fatal(err)
		}
		i := c.Info()
		if string(c.PublicKey()) != string(public) || !i.Sensitive || !i.NeverExtractable || !i.Local || i.AlwaysAuthenticate != x.each || i.PublicFrom != "public key" || i.Token != tok.Label {
			t.Errorf("%+v", i)
		}
		signs(t, c)
		signs(t, c)
		if _, err := c.Sign(t.Context(), make([]byte, digestSize(c)-1)); !errors.Is(err, hsm.ErrInvalid) {
			t.Errorf("a short digest: %v", err)
		}
		if err := c.Close(); err != nil {
			t.Error(err)
		}
		if _, err := c.Sign(t.Context(), make([]byte, digestSize(c))); !errors.Is(err, hsm.ErrInvalid) {
			t.Errorf("after Close: %v", err)
		}
	}
}

func TestCredentialRefuses(t *testing.T) {
	tok := hsmtest.New(t)
	one := credentialAt(tok, "one", "%01")
	for _, cfg := range []hsm.CredentialConfig{one, credentialAt(tok, "two", "%02")} {
		c, err := hsm.GenerateCredential(t.Context(), cfg, nil, false)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Close(); err != nil {
			t.Fatal(err)
		}
	}
	wrong := filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(wrong, []byte("not-the-pin\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	with := func(change func(*hsm.CredentialConfig)) hsm.CredentialConfig { c := one; change(&c); return c }
	for name, x := range map[string]struct {
		cfg  hsm.CredentialConfig
		kind error
	}{
		"no such key":       {credentialAt(tok, "one", "%02"), hsm.ErrNotProvisioned},
		"two keys":          {with(func(c *hsm.CredentialConfig) { c.URI = tok.URI }), hsm.ErrInvalid},
		"a wrong PIN":       {with(func(c *hsm.CredentialConfig) { c.PINFile = wrong }), hsm.ErrPIN},
		"no PIN":            {with(func(c *hsm.CredentialConfig) { c.PINFile = "" }), hsm.ErrInvalid},
		"another token":     {with(func(c *hsm.CredentialConfig) { c.URI = strings.Replace(c.URI, tok.Label, "other", 1) }), hsm.ErrTokenNotFound},
		"a PIN in the URI":  {with(func(c *hsm.CredentialConfig) { c.URI += "&pin-value=1234" }), hsm.ErrInvalid},
		"no library":        {with(func(c *hsm.CredentialConfig) { c.URI, _, _ = strings.Cut(c.URI, "?") }), hsm.ErrInvalid},
		"a public key":      {with(func(c *hsm.CredentialConfig) { c.URI = strings.Replace(c.URI, "private", "public", 1) }), hsm.ErrInvalid},
		"neither token":     {with(func(c *hsm.CredentialConfig) { c.URI = "pkcs11:id=%01?module-path=/x" }), hsm.ErrInvalid},
		"a missing library": {with(func(c *hsm.CredentialConfig) { c.URI = "pkcs11:token=x?module-path=/nonexistent.so" }), hsm.ErrModule},
	} {
		if c, err := hsm.OpenCredential(t.Context(), x.cfg); !errors.Is(err, x.kind) {
			t.Errorf("%s: %v", name, err)
			if err == nil {
				_ = c.Close() // the test has failed already
			}
		} else if strings.Contains(err.Error(), "not-the-pin") || strings.Contains(err.Error(), "1234") {
			t.Errorf("%s: the error shows a PIN", name)
		}
	}
	if _, err := hsm.GenerateCredential(t.Context(), with(func(c *hsm.CredentialConfig) { c.URI = tok.URI }), nil, false); !errors.Is(err, hsm.ErrInvalid) {
		t.Errorf("a new key without a name: %v", err)
	}
	// A wrong PIN has not locked the token.
	c, err := hsm.OpenCredential(t.Context(), one)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

func TestCredentialURI(t *testing.T) {
	for in, want := range map[string]string{
		"pkcs11:token=T;id=%01%ff;object=a%20b;type=private?module-path=/m.so": "pkcs11:token=T;object=a%20b;id=%01%FF?module-path=/m.so",
		"pkcs11:serial=9?module-path=/m.so":                                    "pkcs11:serial=9?module-path=/m.so",
	} {
		u, err := hsm.ParseCredentialURI(in)
		if err != nil || u.String() != want {
			t.Errorf("%s: %v, %s", in, err, u)
			continue
		}
		again, err := hsm.ParseCredentialURI(u.String())
		if err != nil || again.String() != want {
			t.Errorf("%s again: %v", want, err)
		}
	}
	if _, err := hsm.ParseURI("pkcs11:token=T;object=x?module-path=/m.so"); !errors.Is(err, hsm.ErrInvalid) {
		t.Errorf("a device named by an object: %v", err)
	}
}
