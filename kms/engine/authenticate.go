package engine

import (
	"crypto/tls"
	"crypto/x509"
	"slices"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
)

// Authenticate returns the identity of a client's verified certificate: its one
// URI SAN, a SPIFFE ID of a site's trust domain. The chain must end at a CA of
// that very site, so a site's CA can only speak for its own trust domain. Node
// certificates are a class apart and refused here. Errors: kms.Unauthenticated.
func (e *Engine) Authenticate(peer []*x509.Certificate) (kms.Identity, error) {
	return authenticate(e.cluster.State(), peer, e.now())
}

// ServerTLS returns the TLS configuration of a door for clients: TLS 1.3, mutual,
// hybrid key exchange preferred or, with hybridOnly, required.
func (e *Engine) ServerTLS(cert tls.Certificate, hybridOnly bool) *tls.Config {
	groups := []tls.CurveID{tls.X25519MLKEM768, tls.SecP384r1MLKEM1024, tls.SecP256r1MLKEM768}
	if !hybridOnly {
		groups = append(groups, tls.X25519, tls.CurveP256, tls.CurveP384)
	}
	return &tls.Config{
		MinVersion:       tls.VersionTLS13,
		Certificates:     []tls.Certificate{cert},
		CurvePreferences: groups,
		ClientAuth:       tls.RequireAnyClientCert, // verified below, against the one site's CAs
		VerifyConnection: func(cs tls.ConnectionState) error {
			_, err := e.Authenticate(cs.PeerCertificates)
			return err
		},
		NextProtos: []string{"h2", "http/1.1"},
	}
}

func authenticate(st *state.State, peer []*x509.Certificate, now time.Time) (kms.Identity, error) {
	refuse := func(why string) (kms.Identity, error) {
		return kms.Identity{}, &kms.Error{Kind: kms.Unauthenticated, Msg: "the client certificate is refused: " + why,
			Fix: "use one that a site's CA issued with the one URI SAN spiffe://TRUST-DOMAIN/ROLE/NAME"}
	}
	if len(peer) == 0 {
		return refuse("there is none")
	}
	leaf := peer[0]
	if len(leaf.URIs) != 1 {
		return refuse("it has not exactly one URI SAN")
	}
	id, err := kms.ParseIdentity(leaf.URIs[0].String())
	if err != nil {
		return kms.Identity{}, err
	}
	if id.Role == "node" {
		return refuse("a node's certificate is not for clients")
	}
	sites := st.Sites()
	i := slices.IndexFunc(sites, func(s state.Site) bool { return s.TrustDomain == id.TrustDomain })
	if i < 0 {
		return refuse("no site of this cluster has its trust domain")
	}
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, der := range sites[i].CAs {
		ca, err := x509.ParseCertificate(der)
		if err != nil {
			return refuse("a CA certificate of its site cannot be read")
		}
		roots.AddCert(ca)
	}
	for _, c := range peer[1:] {
		intermediates.AddCert(c)
	}
	_, err = leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: intermediates, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}})
	if err != nil {
		return kms.Identity{}, kms.Wrap(kms.Unauthenticated, err, "the client certificate is not valid for a CA of its own site",
			"renew it, or have the site's CA issue it")
	}
	return id, nil
}
