package keyring

import (
	"bytes"
	"context"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"math/big"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/pqc"
)

func secretOf(t testing.TB, b []byte) *secret.Bytes {
	t.Helper()
	s := must[*secret.Bytes](t)(secret.Copy(b))
	t.Cleanup(s.Destroy)
	return s
}

func random(n int) []byte {
	b := make([]byte, n)
	_, _ = rand.Read(b)
	return b
}

func TestOpenImport(t *testing.T) {
	ctx := context.Background()
	r, dev := newRoot(t, pqc.MLKEM768P256)
	info, aad := []byte("info"), []byte("aad")
	seal := func(b []byte) []byte { return must[[]byte](t)(r.PublicKey().Seal(info, aad, b)) }
	key := random(32)
	m, public, err := r.OpenImport(ctx, info, aad, seal(key), kms.AES256GCM)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Destroy()
	if !bytes.Equal(m.Reveal(), key) || public != nil {
		t.Error("the material is not what was sealed")
	}
	made, want, err := Generate(kms.ECDSAP384, random(EntropySize))
	if err != nil {
		t.Fatal(err)
	}
	defer made.Destroy()
	s, public, err := r.OpenImport(ctx, info, aad, seal(made.Reveal()), kms.ECDSAP384)
	if err != nil || !bytes.Equal(public, want) {
		t.Errorf("%v, public key of %d bytes", err, len(public))
	}
	s.Destroy()
	for what, c := range map[string]struct {
		info, aad, sealed []byte
		algorithm         kms.Algorithm
		kind              kms.Kind
	}{
		"other info":      {aad, aad, seal(key), kms.AES256GCM, kms.OpenFailed},
		"other aad":       {info, info, seal(key), kms.AES256GCM, kms.OpenFailed},
		"cut off":         {info, aad, seal(key)[:100], kms.AES256GCM, kms.OpenFailed},
		"nothing":         {info, aad, nil, kms.AES256GCM, kms.OpenFailed},
		"another size":    {info, aad, seal(key[:31]), kms.AES256GCM, kms.Invalid},
		"of another kind": {info, aad, seal(key), kms.ECDSAP384, kms.Invalid},
		"unknown":         {info, aad, seal(key), "aes", kms.Invalid},
		"empty":           {info, aad, seal(nil), kms.AES256GCM, kms.Invalid},
	} {
		if _, _, err := r.OpenImport(ctx, c.info, c.aad, c.sealed, c.algorithm); !errors.Is(err, c.kind) {
			t.Errorf("%s: %v, want %v", what, err, c.kind)
		}
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	if _, _, err := r.OpenImport(ctx, info, aad, seal(key), kms.AES256GCM); !errors.Is(err, kms.Unavailable) {
		t.Errorf("without a device: %v", err)
	}
}

func TestWeakImports(t *testing.T) {
	repeat := func(s string, n int) []byte { return []byte(strings.Repeat(s, n)) }
	counting := make([]byte, 32)
	for i := range counting {
		counting[i] = byte(0x20 + 3*i)
	}
	small := append(make([]byte, 9), random(23)...)
	large := new(big.Int).Sub(elliptic.P256().Params().N, new(big.Int).SetBytes(random(20))).Bytes()
	for what, c := range map[string]struct {
		a kms.Algorithm
		b []byte
	}{
		"zero":                 {kms.AES256GCM, make([]byte, 32)},
		"one byte":             {kms.HMACSHA256, repeat("\xa7", 32)},
		"a pattern":            {kms.HMACSHA256, repeat("\x01\xfe\x07\x93\x55\xaa\x10\x80", 4)},
		"a sequence":           {kms.AES256GCM, counting},
		"hexadecimal":          {kms.AES256GCM, []byte("0123456789abcdefFEDCBA9876543210")},
		"a password":           {kms.HMACSHA256, []byte("correct horse battery staple, 12")},
		"scalar zero":          {kms.ECDSAP256, make([]byte, 32)},
		"a small scalar":       {kms.ECDSAP256, small},
		"a scalar near n":      {kms.ECDSAP256, large},
		"a scalar beyond n":    {kms.ECDSAP256, append(repeat("\xff", 16), random(16)...)},
		"an Ed25519 sequence":  {kms.Ed25519, counting},
		"a P-384 key, 1 to 48": {kms.ECDSAP384, append(append([]byte{}, counting...), 0x80, 0x83, 0x86, 0x89, 0x8c, 0x8f, 0x92, 0x95, 0x98, 0x9b, 0x9e, 0xa1, 0xa4, 0xa7, 0xaa, 0xad)},
	} {
		if _, err := CheckImport(c.a, secretOf(t, c.b)); !errors.Is(err, kms.Invalid) {
			t.Errorf("%s: %v", what, err)
		} else if strings.Contains(err.Error(), string(c.b[:4])) {
			t.Errorf("%s: the error shows the material", what)
		}
	}
	for _, a := range []kms.Algorithm{kms.AES256GCM, kms.HMACSHA256, kms.Ed25519, kms.ECDSAP256, kms.ECDSAP384} {
		for range 200 {
			m, _, err := Generate(a, random(EntropySize))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := CheckImport(a, m); err != nil {
				t.Errorf("%s: a random key is refused: %v", a, err)
			}
			m.Destroy()
		}
	}
}

// TestImportVersion: every resident's device can use what was brought, as its owner can.
func TestImportVersion(t *testing.T) {
	fr, dev := newRoot(t, pqc.MLKEM768P256)
	kind, public := dev.ImportKey()
	importers := map[string]Importer{kind: {WrapHMAC: hsm.WrapHMAC, WrapSigner: hsm.WrapSigner}}
	resident := Resident{Recipient: recipient("fr-1", fr), ImportKind: kind, Import: public}
	b := KeyBinding{Cluster: "0123456789abcdef", Keyring: "vault", KeyID: kms.KeyID{1}, Version: 1, Algorithm: kms.HMACSHA256, Purpose: kms.MAC}
	key := random(32)
	v, err := fr.ImportVersion("fr-1", importers, b, []Resident{resident}, secretOf(t, key), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer v.Material.Destroy()
	if len(v.Copies) != 1 || v.Generated != kms.OnHost {
		t.Errorf("%d copies, generated %q", len(v.Copies), v.Generated)
	}
	m, err := fr.LoadVersion(context.Background(), b, "fr-1", v.Copies[0].Sealed)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Destroy()
	if err := m.VerifyMAC(context.Background(), []byte("message"), must[[]byte](t)(v.Material.MAC(context.Background(), []byte("message")))); err != nil {
		t.Error(err)
	}
	other := resident
	other.Node, other.ImportKind = "de-1", "unknown"
	for what, l := range map[string][]Resident{"no resident": nil, "not here": {other}, "no importer": {resident, other}, "no kind": {{Recipient: resident.Recipient}}} {
		if _, err := fr.ImportVersion("fr-1", importers, b, l, secretOf(t, key), nil); !errors.Is(err, kms.Invalid) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
