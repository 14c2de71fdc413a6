package client

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"

	"github.com/conclave-kms/conclave/kms"
)

// HybridGroups are the hybrid post-quantum key exchange groups of TLS 1.3.
func HybridGroups() []tls.CurveID {
	return []tls.CurveID{tls.X25519MLKEM768, tls.SecP384r1MLKEM1024, tls.SecP256r1MLKEM768}
}

// LoadTLS reads the sites' CA certificates and the caller's certificate and key,
// all PEM. Key exchange is hybrid only: a node that does not offer it is refused.
func LoadTLS(caFile, certFile, keyFile string) (*tls.Config, error) {
	for _, f := range []struct{ what, path, env string }{
		{"CA certificates", caFile, "CONCLAVE_CACERT"}, {"client certificate", certFile, "CONCLAVE_CLIENT_CERT"}, {"client key", keyFile, "CONCLAVE_CLIENT_KEY"},
	} {
		if f.path == "" {
			return nil, &kms.Error{Kind: kms.Invalid, Msg: "no file with the " + f.what + " is given", Fix: "set " + f.env}
		}
	}
	pem, err := os.ReadFile(caFile)
	if err != nil {
		return nil, kms.Wrap(kms.Invalid, err, fmt.Sprintf("CA certificates: %v", err), "set CONCLAVE_CACERT")
	}
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(pem) {
		return nil, kms.Errorf(kms.Invalid, "%s holds no PEM certificate", caFile)
	}
	cert, err := tls.LoadX509KeyPair(certFile, keyFile)
	if err != nil {
		return nil, kms.Wrap(kms.Invalid, err, fmt.Sprintf("client certificate: %v", err), "set CONCLAVE_CLIENT_CERT and CONCLAVE_CLIENT_KEY to a PEM pair")
	}
	return &tls.Config{MinVersion: tls.VersionTLS13, RootCAs: pool, Certificates: []tls.Certificate{cert}, CurvePreferences: HybridGroups()}, nil
}
