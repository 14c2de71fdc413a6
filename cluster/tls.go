package cluster

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
)

// The protocols on a node's listener, told apart by ALPN (RFC 7301).
const (
	protoRaft    = "conclave-raft/1"
	protoForward = "conclave-forward/1"
)

// roleNode is the first path segment of a node's SPIFFE ID.
const roleNode = "node"

// nodeGroups returns the key exchange groups allowed between nodes, all hybrid:
// ML-KEM with an elliptic curve (draft-ietf-tls-ecdhe-mlkem).
func nodeGroups() []tls.CurveID {
	return []tls.CurveID{tls.X25519MLKEM768, tls.SecP384r1MLKEM1024}
}

// directory is what the transport needs to know of the state: who is a node,
// and which CAs speak for a site.
type directory interface {
	Node(id string) (state.Node, bool)
	Site(id string) (state.Site, bool)
}

// refuse returns the error for a connection that is not accepted.
func refuse(format string, args ...any) error {
	return kms.Errorf(kms.Unauthenticated, format, args...)
}

// verifyPeer checks a finished handshake and returns the peer's node id. want is
// the node that was dialled, or "" on the accepting side; self is this node's id.
// The peer must hold a certificate with exactly one URI SAN,
// spiffe://TRUST-DOMAIN/node/ID, where ID is a node of the state, TRUST-DOMAIN
// is its site's, and the chain ends in a CA of that very site. The common name
// and all other names in the certificate mean nothing.
func verifyPeer(dir directory, self, want string, cs tls.ConnectionState) (string, error) {
	if cs.Version != tls.VersionTLS13 {
		return "", refuse("peer speaks %s, nodes speak TLS 1.3 only", tls.VersionName(cs.Version))
	}
	if !slices.Contains(nodeGroups(), cs.CurveID) {
		return "", refuse("key exchange %v between nodes is not hybrid post-quantum", cs.CurveID)
	}
	if cs.DidResume {
		return "", refuse("session resumption is not used between nodes")
	}
	if len(cs.PeerCertificates) == 0 {
		return "", refuse("peer shows no certificate")
	}
	id, err := certificateNode(cs.PeerCertificates[0])
	if err != nil {
		return "", err
	}
	node, ok := dir.Node(id.Name)
	if d, joining := dir.(introductions); !ok && joining {
		node, ok = d.anyone(id)
	}
	if !ok {
		return "", refuse("%s is not a node of this cluster", id)
	}
	site, ok := dir.Site(node.Site)
	if !ok || site.TrustDomain != id.TrustDomain {
		return "", refuse("%s: node %s belongs to another trust domain", id, node.ID)
	}
	if err := verifyChain(site, cs.PeerCertificates); err != nil {
		return "", err
	}
	if node.ID == self {
		return "", refuse("%s is this node itself: its certificate is in use elsewhere, or the address of a peer leads back here", id)
	}
	if want != "" && node.ID != want {
		return "", refuse("the address of node %s is answered by node %s", want, node.ID)
	}
	return node.ID, nil
}

// certificateNode reads the identity of a node from its certificate.
func certificateNode(leaf *x509.Certificate) (kms.Identity, error) {
	if len(leaf.URIs) != 1 {
		return kms.Identity{}, refuse("certificate has %d URI names, a node's has exactly one", len(leaf.URIs))
	}
	id, err := kms.ParseIdentity(leaf.URIs[0].String())
	if err != nil {
		return kms.Identity{}, err
	}
	if id.Role != roleNode {
		return kms.Identity{}, refuse("%s is not the identity of a node", id)
	}
	return id, nil
}

// verifyChain checks that the chain ends in one of the site's own CAs and may be
// used for TLS.
func verifyChain(site state.Site, chain []*x509.Certificate) error {
	roots, intermediates := x509.NewCertPool(), x509.NewCertPool()
	for _, der := range site.CAs {
		ca, err := x509.ParseCertificate(der)
		if err != nil {
			return kms.Wrap(kms.Internal, err, fmt.Sprintf("a CA certificate of site %s is unreadable", site.ID), "")
		}
		roots.AddCert(ca)
	}
	for _, c := range chain[1:] {
		intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(x509.VerifyOptions{
		Roots:         roots,
		Intermediates: intermediates,
		KeyUsages:     []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	})
	if err != nil {
		return kms.Wrap(kms.Unauthenticated, err,
			fmt.Sprintf("certificate was not issued by a CA of site %s or is not valid now: %v", site.ID, err), "")
	}
	return nil
}

// tlsConfig returns the TLS configuration of one side of a connection between
// nodes. verify replaces the standard verification, which knows host names but
// no nodes; it runs in every handshake, since there is no resumption.
func tlsConfig(cert tls.Certificate, protos []string, verify func(tls.ConnectionState) error) *tls.Config {
	return &tls.Config{
		Certificates:           []tls.Certificate{cert},
		MinVersion:             tls.VersionTLS13,
		CurvePreferences:       nodeGroups(),
		NextProtos:             protos,
		ClientAuth:             tls.RequireAnyClientCert, // verified by verify
		InsecureSkipVerify:     true,                     // verified by verify
		VerifyConnection:       verify,
		SessionTicketsDisabled: true,
	}
}

// checkOwnCertificate refuses a certificate that no peer would accept, and says
// which one is needed.
func checkOwnCertificate(dir directory, self string, cert tls.Certificate) error {
	err := acceptable(dir, self, cert)
	var refused *kms.Error
	if !errors.As(err, &refused) {
		return err
	}
	node, _ := dir.Node(self)
	site, _ := dir.Site(node.Site)
	return kms.Wrap(refused.Kind, err, "this node's certificate is not accepted: "+refused.Msg,
		fmt.Sprintf("use a certificate that the CA of site %s issued for the one URI SAN spiffe://%s/node/%s", site.ID, site.TrustDomain, self))
}

func acceptable(dir directory, self string, cert tls.Certificate) error {
	var chain []*x509.Certificate
	for _, der := range cert.Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return kms.Wrap(kms.Invalid, err, "the node certificate is unreadable", "")
		}
		chain = append(chain, c)
	}
	if len(chain) == 0 {
		return kms.Errorf(kms.Invalid, "the node certificate is missing")
	}
	id, err := certificateNode(chain[0])
	if err != nil {
		return err
	}
	node, ok := dir.Node(self)
	if !ok || id.Name != self {
		return kms.Errorf(kms.Invalid, "the certificate is for %s, this node is %s", id, self)
	}
	site, ok := dir.Site(node.Site)
	if !ok || site.TrustDomain != id.TrustDomain {
		return kms.Errorf(kms.Invalid, "the certificate is for %s, but site %s has trust domain %s", id, node.Site, site.TrustDomain)
	}
	return verifyChain(site, chain)
}
