package main

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"
)

func newDev(t testing.TB) *dev { return &dev{dir: t.TempDir(), out: io.Discard} }

func entries(t testing.TB, dir string) (names []string) {
	t.Helper()
	list, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

func TestDevTakesNoForeignDirectory(t *testing.T) {
	d := newDev(t)
	if err := os.WriteFile(d.path("precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, keep := range []bool{false, true} {
		if _, err := d.prepare(keep); err == nil || !strings.Contains(err.Error(), "not empty") || !strings.Contains(err.Error(), "--dir") {
			t.Errorf("keep %v: %v", keep, err)
		}
	}
	if got := entries(t, d.dir); !slices.Equal(got, []string{"precious"}) {
		t.Errorf("left behind: %v", got)
	}
	if err := os.WriteFile(d.path(devMarker), []byte(`{"format":1,"x":2}`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := d.prepare(true); err == nil || !strings.Contains(err.Error(), devMarker) {
		t.Errorf("a marker that is not ours: %v", err)
	}
}

func TestDevClearsOnlyItsOwn(t *testing.T) {
	d := newDev(t)
	fresh, err := d.prepare(false)
	if err != nil || !fresh {
		t.Fatal(fresh, err)
	}
	own := append(entries(t, d.dir), "env", "genesis.toml", "genesis.cbor")
	for _, name := range []string{"env", "genesis.toml", "genesis.cbor", "notes", "frx", "ca/fr.pem"} {
		if err := os.WriteFile(d.path(name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(d.path("mine"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := d.clear(); err != nil {
		t.Fatal(err)
	}
	if got := entries(t, d.dir); !slices.Equal(got, []string{"frx", "mine", "notes"}) {
		t.Errorf("left behind: %v; own are %v", got, own)
	}
}

func TestDevKeep(t *testing.T) {
	d := newDev(t)
	if _, err := d.prepare(false); err != nil {
		t.Fatal(err)
	}
	ports := slices.Clone(d.sites)
	for i, s := range ports {
		for _, o := range ports[:i] {
			if s.api == o.api || s.api == o.cluster || s.cluster == o.cluster || s.api == s.cluster || s.api == 0 {
				t.Errorf("ports %+v", ports)
			}
		}
	}
	// Not founded completely: --keep makes it anew.
	if err := os.WriteFile(d.path("genesis.cbor"), []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	if fresh, err := d.prepare(true); err != nil || !fresh {
		t.Errorf("%v, %v", fresh, err)
	}
	if _, err := os.Stat(d.path("genesis.cbor")); err == nil {
		t.Error("the unfinished cluster was kept")
	}
	if err := d.save(true); err != nil {
		t.Fatal(err)
	}
	want := slices.Clone(d.sites)
	if fresh, err := d.prepare(true); err != nil || fresh || !slices.Equal(d.sites, want) {
		t.Errorf("%v, %v: %+v instead of %+v", fresh, err, d.sites, want)
	}
	if fresh, err := d.prepare(false); err != nil || !fresh {
		t.Errorf("%v, %v", fresh, err)
	}
	for _, dir := range []string{"ca", "clients", "custodians", "fr", "de", "jp"} {
		if info, err := os.Stat(d.path(dir)); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%s: %v, %v", dir, info, err)
		}
	}
}

func TestDevNeedsADirectory(t *testing.T) {
	refused(t, []string{"dev"}, "--dir is missing")
	refused(t, []string{"dev", "--dir", os.DevNull}, os.DevNull)
}

// TestDevConfig holds that what dev writes is a configuration and a plan.
func TestDevConfig(t *testing.T) {
	d := newDev(t)
	if _, err := d.prepare(false); err != nil {
		t.Fatal(err)
	}
	if err := d.writeConfig("fr", deviceSection{Type: "pkcs11", URI: "pkcs11:token=x", SoftHSMConf: "/conf"}); err != nil {
		t.Fatal(err)
	}
	if err := d.writeConfig("jp", deviceSection{Type: "tpm", Path: "unix:/sock", AuthFile: "/auth", EKChain: devEKChain}); err != nil {
		t.Fatal(err)
	}
	for site, node := range map[string]string{"fr": "fr-1", "jp": "jp-1"} {
		c, err := loadConfig(d.path(site, "conclaved.toml"))
		if err != nil || c.Node != node || c.Site != site || c.Genesis != d.path("genesis.cbor") || c.DataDir != d.path(site, "data") {
			t.Errorf("%+v, %v", c, err)
		}
		if site == "jp" && c.Device.EKChain != d.path("jp", devEKChain) {
			t.Errorf("chain of the endorsement key: %s", c.Device.EKChain)
		}
	}
	if err := d.writeConfig("uk", deviceSection{}); err == nil {
		t.Error("a configuration of no site was written")
	}
	b, err := toml.Marshal(d.plan())
	if err != nil {
		t.Fatal(err)
	}
	var p genesisPlan
	if err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(&p); err != nil {
		t.Fatalf("%v in\n%s", err, b)
	}
	for _, n := range p.Nodes {
		if witnessed := n.Witness != ""; witnessed != strings.HasPrefix(n.Card, "jp/") {
			t.Errorf("%+v", n)
		}
	}
	if !slices.Equal(p.Vendors, []string{devVendor}) {
		t.Errorf("vendors %q", p.Vendors)
	}
	for _, r := range p.Policies[1].Rules {
		if slices.Contains(r.Actions, "destroy") && (r.Delay.Duration != 7*24*time.Hour || r.Lifetime.Duration != 28*24*time.Hour) {
			t.Errorf("destroy: %+v", r)
		}
		if len(r.Direct) > 0 && (r.Delay.Duration != 0 || r.Lifetime.Duration != 0) {
			t.Errorf("a direct rule has times: %+v", r)
		}
	}
	if !bytes.Contains(b, []byte("168h0m0s")) {
		t.Errorf("the plan has no readable durations:\n%s", b)
	}
}

func TestPKI(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	ca, err := newAuthority("fr.example", at("ca.pem"), at("ca.key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := ca.issue("spiffe://fr.example/node/fr-1", true, at("node.crt"), at("node.key")); err != nil {
		t.Fatal(err)
	}
	if err := ca.issue("spiffe://fr.example/service/demo", false, at("client.crt"), at("client.key")); err != nil {
		t.Fatal(err)
	}
	if err := ca.issue("spiffe://fr.example/x/y", false, at("client.crt"), at("client2.key")); err == nil {
		t.Error("a certificate was replaced")
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	for name, server := range map[string]bool{"node": true, "client": false} {
		c := readCertificate(t, at(name+".crt"))
		if len(c.URIs) != 1 || !strings.HasPrefix(c.URIs[0].String(), "spiffe://fr.example/") {
			t.Errorf("%s: %v", name, c.URIs)
		}
		for _, u := range []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth} {
			_, err := c.Verify(x509.VerifyOptions{Roots: roots, KeyUsages: []x509.ExtKeyUsage{u}})
			if want := server || u == x509.ExtKeyUsageClientAuth; (err == nil) != want {
				t.Errorf("%s for usage %v: %v", name, u, err)
			}
		}
		if err := c.VerifyHostname("127.0.0.1"); (err == nil) != server {
			t.Errorf("%s on loopback: %v", name, err)
		}
		if info, err := os.Stat(at(name + ".key")); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	if err := concat(at("bundle"), at("ca.pem"), at("node.crt")); err != nil {
		t.Fatal(err)
	}
	if l, err := readCertificates(at("bundle")); err != nil || len(l) != 2 {
		t.Errorf("%d certificates, %v", len(l), err)
	}
	if err := concat(at("bundle2"), at("none")); err == nil {
		t.Error("a missing part was ignored")
	}
}

func readCertificate(t testing.TB, path string) *x509.Certificate {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		t.Fatalf("%s holds no PEM", path)
	}
	c, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
