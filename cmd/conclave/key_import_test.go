package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/keyring"
)

// TestReadMaterial: a key is read from each form to the same bytes that the keyring uses.
func TestReadMaterial(t *testing.T) {
	dir := t.TempDir()
	file := func(name string, b []byte) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	block := func(kind string, der []byte, err error) []byte {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	}
	p256, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	public, seed, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8 := func(k any) []byte {
		der, err := x509.MarshalPKCS8PrivateKey(k)
		return block("PRIVATE KEY", der, err)
	}
	sec1, err := x509.MarshalECPrivateKey(p384)
	point := func(k *ecdsa.PrivateKey) []byte {
		b, err := k.PublicKey.Bytes()
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	raw, err2 := p256.Bytes()
	if err = errors.Join(err, err2); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		content   []byte
		algorithm kms.Algorithm
		public    []byte
	}{
		"p256":    {pkcs8(p256), kms.ECDSAP256, point(p256)},
		"p384":    {pkcs8(p384), kms.ECDSAP384, point(p384)},
		"sec1":    {block("EC PRIVATE KEY", sec1, nil), kms.ECDSAP384, point(p384)},
		"ed25519": {pkcs8(seed), kms.Ed25519, public},
		"bytes":   {raw, kms.ECDSAP256, point(p256)},
		"seed":    {seed.Seed(), kms.Ed25519, public},
	} {
		m, err := readMaterial(file(name, c.content), c.algorithm)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if got, err := keyring.CheckImport(c.algorithm, m); err != nil || !bytes.Equal(got, c.public) {
			t.Errorf("%s: another public key, or %v", name, err)
		}
		m.Destroy()
	}
	for name, c := range map[string]struct {
		content   []byte
		algorithm kms.Algorithm
	}{
		"another-curve": {pkcs8(p256), kms.ECDSAP384},
		"no-curve":      {pkcs8(seed), kms.ECDSAP256},
		"no-signer":     {pkcs8(p256), kms.AES256GCM},
		"encrypted":     {block("ENCRYPTED PRIVATE KEY", raw, nil), kms.ECDSAP256},
		"damaged":       {block("PRIVATE KEY", raw, nil), kms.ECDSAP256},
		"cut":           {[]byte("-----BEGIN PRIVATE KEY-----\nAAAA"), kms.ECDSAP256},
	} {
		if _, err := readMaterial(file(name, c.content), c.algorithm); !errors.Is(err, kms.Invalid) || strings.Contains(err.Error(), string(raw[:4])) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := readMaterial(filepath.Join(dir, "none"), kms.AES256GCM); err == nil {
		t.Error("a file that is not there was read")
	}
}
