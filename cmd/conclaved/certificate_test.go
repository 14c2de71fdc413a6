package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestNodeCertificate(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	ca, err := newAuthority("fr.example", at("ca.pem"), at("ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := ca.issue("spiffe://fr.example/node/fr-1", true, at("node.crt"), at("node.key")); err != nil {
		t.Fatal(err)
	}
	c := TLSConfig{Certificate: at("node.crt"), Key: at("node.key")}
	cert, err := c.load()
	if err != nil {
		t.Fatal(err)
	}
	if err := certifies(cert, "https://127.0.0.1:7443"); err != nil {
		t.Error(err)
	}
	if err := certifies(cert, "https://fr-1.example.org:7443"); err == nil {
		t.Error("the certificate is held to be for a name that is not in it")
	}
	if err := os.Chmod(c.Key, 0o604); err != nil {
		t.Fatal(err)
	}
	if _, err := c.load(); err == nil || !strings.Contains(err.Error(), "chmod 600") {
		t.Errorf("a key that everybody can read: %v", err)
	}
}
