package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

func itoa(n int) string { return strconv.Itoa(n) }

// expires waits until the cluster's clock has passed the proposal's expiry.
func (s site) expires(id string, within time.Duration) {
	s.t.Helper()
	err := harness.Within(s.t.Context(), within, "the proposal expires", func(ctx context.Context) error {
		p, err := s.client("de", "operator").Proposal(ctx, id)
		if err == nil && p.Progress != "expired" {
			err = fmt.Errorf("it is %s", p.Progress)
		}
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// authority is a CA in the hands of the test.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newAuthority(t *testing.T, name string) authority {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	a := authority{key: key, cert: &x509.Certificate{Subject: pkix.Name{CommonName: name}, PublicKey: &key.PublicKey}}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	return a
}

// siteAuthority is a site's real CA.
func siteAuthority(t *testing.T, s site, name string) authority {
	t.Helper()
	pair, err := tls.LoadX509KeyPair(filepath.Join(s.c.Dir, "ca", name+".pem"), filepath.Join(s.c.Dir, "ca", name+".key"))
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(pair.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	return authority{cert, pair.PrivateKey.(*ecdsa.PrivateKey)}
}

// issue makes a client certificate with the URI SANs.
func (a authority) issue(t *testing.T, change func(*x509.Certificate), uris ...string) tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "admin"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	}
	for _, s := range uris {
		u, err := url.Parse(s)
		if err != nil {
			t.Fatal(err)
		}
		template.URIs = append(template.URIs, u)
	}
	if change != nil {
		change(template)
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, &key.PublicKey, a.key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func strangersCA(t *testing.T) string {
	t.Helper()
	f := filepath.Join(t.TempDir(), "ca.pem")
	b := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: newAuthority(t, "CA of a stranger").cert.Raw})
	if err := os.WriteFile(f, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return f
}

// TestWrongCertificate: a certificate that no site issued for this purpose opens
// nothing, and the message says what kind is needed.
func TestWrongCertificate(t *testing.T) {
	s := site{t, cluster(t)}
	name := unique("certificates")
	s.key("coalition", name, "encrypt", "")
	fr := siteAuthority(t, s, "fr")
	stranger := newAuthority(t, "CA of a stranger")
	impostor := newAuthority(t, fr.cert.Subject.CommonName) // same name, other key
	node, err := tls.LoadX509KeyPair(filepath.Join(s.c.Dir, "fr", "node.crt"), filepath.Join(s.c.Dir, "fr", "node.key"))
	if err != nil {
		t.Fatal(err)
	}
	const service = "spiffe://fr.example/service/app"
	pool := x509.NewCertPool()
	bundle, err := os.ReadFile(s.c.Vars["CONCLAVE_CACERT"])
	if err != nil {
		t.Fatal(err)
	}
	pool.AppendCertsFromPEM(bundle)
	use := func(cert tls.Certificate) error {
		cl, err := client.New(client.Config{
			Addresses: []string{s.c.API("fr")}, Attempts: 1,
			TLS: &tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13, GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &cert, nil }},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer cl.Close()
		_, err = cl.Key("coalition", name).Encrypt(t.Context(), wire.EncryptRequest{Plaintext: wire.Secret("x")})
		return err
	}
	if err := use(fr.issue(t, nil, service)); err != nil {
		t.Fatalf("a proper certificate is refused: %v", err)
	}
	for what, cert := range map[string]tls.Certificate{
		"no certificate":                {},
		"another CA":                    stranger.issue(t, nil, service),
		"a CA of the same name":         impostor.issue(t, nil, service),
		"another site's identity":       fr.issue(t, nil, "spiffe://de.example/service/app"),
		"a trust domain of nobody":      fr.issue(t, nil, "spiffe://us.example/service/app"),
		"a node's certificate":          node,
		"a node's identity":             fr.issue(t, nil, "spiffe://fr.example/node/fr-1"),
		"no URI, the common name alone": fr.issue(t, nil),
		"two URIs":                      fr.issue(t, nil, service, "spiffe://fr.example/operator/admin"),
		"expired": fr.issue(t, func(c *x509.Certificate) {
			c.NotBefore, c.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
		}, service),
		"for servers only": fr.issue(t, func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, service),
		"a role of nobody": fr.issue(t, nil, "spiffe://fr.example/president/app"),
	} {
		t.Run(what, func(t *testing.T) {
			err := use(cert)
			switch {
			case err == nil:
				t.Fatal("it was let in")
			case !errors.Is(err, kms.Unauthenticated) && !errors.Is(err, kms.Denied):
				t.Errorf("it is refused as %v: %v", kms.KindOf(err), err)
			case !strings.Contains(err.Error(), "spiffe://"):
				t.Errorf("the message does not say which identity is needed or refused: %v", err)
			}
			t.Log(err)
		})
	}
}
