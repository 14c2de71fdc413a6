package engine

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"net/url"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// A site's CA speaks for its own trust domain alone.
func TestAuthenticate(t *testing.T) {
	w := newWorld(t, "")
	now := w.clock.Now()
	issue := func(site string, change func(*x509.Certificate), uris ...string) []*x509.Certificate {
		ca := check[*x509.Certificate](t)(x509.ParseCertificate(w.cas[site].der))
		key := check[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		c := &x509.Certificate{
			SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "operator"}, NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		}
		for _, u := range uris {
			c.URIs = append(c.URIs, check[*url.URL](t)(url.Parse(u)))
		}
		if change != nil {
			change(c)
		}
		der := check[[]byte](t)(x509.CreateCertificate(rand.Reader, c, ca, key.Public(), w.cas[site].key))
		return []*x509.Certificate{check[*x509.Certificate](t)(x509.ParseCertificate(der))}
	}
	e := w.at("jp").engine
	id := check[kms.Identity](t)(e.Authenticate(issue("fr", nil, "spiffe://fr.example/service/billing")))
	if id.String() != "spiffe://fr.example/service/billing" {
		t.Error(id)
	}
	stranger := testCA(t, "fr") // the same name, another key
	w.cas["stranger"] = stranger
	for what, chain := range map[string][]*x509.Certificate{
		"none":                nil,
		"another site's CA":   issue("de", nil, "spiffe://fr.example/service/billing"),
		"an unknown CA":       issue("stranger", nil, "spiffe://fr.example/service/billing"),
		"an unknown domain":   issue("fr", nil, "spiffe://us.example/service/billing"),
		"a node":              issue("fr", nil, "spiffe://fr.example/node/fr-1"),
		"no URI":              issue("fr", nil),
		"two URIs":            issue("fr", nil, "spiffe://fr.example/service/a", "spiffe://fr.example/service/b"),
		"another scheme":      issue("fr", nil, "https://fr.example/service/a"),
		"upper case":          issue("fr", nil, "spiffe://fr.example/service/A"),
		"expired":             issue("fr", func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Second) }, "spiffe://fr.example/service/a"),
		"not yet valid":       issue("fr", func(c *x509.Certificate) { c.NotBefore = now.Add(time.Minute) }, "spiffe://fr.example/service/a"),
		"a server's":          issue("fr", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, "spiffe://fr.example/service/a"),
		"the CA's own, no ID": {check[*x509.Certificate](t)(x509.ParseCertificate(w.cas["fr"].der))},
	} {
		if _, err := e.Authenticate(chain); kms.KindOf(err) != kms.Unauthenticated {
			t.Errorf("%s: %v", what, err)
		}
	}
}
