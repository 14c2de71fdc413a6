package main

import (
	"crypto/tls"
	"fmt"
	"net/url"
	"os"
)

// load reads the node's certificate and its key, which others must not be able to read.
func (c TLSConfig) load() (tls.Certificate, error) {
	if st, err := os.Stat(c.Key); err == nil && st.Mode().IsRegular() && st.Mode().Perm()&0o007 != 0 {
		return tls.Certificate{}, fmt.Errorf("tls: everybody can read or change the key %s: chmod 600 it, and have a new one certified if that was so for long", c.Key)
	}
	cert, err := tls.LoadX509KeyPair(c.Certificate, c.Key)
	if err != nil {
		return cert, fmt.Errorf("tls: the node's certificate %s and key %s: %w", c.Certificate, c.Key, err)
	}
	return cert, nil
}

// certifies returns an error if the certificate is not for the host of an https URL.
func certifies(cert tls.Certificate, address string) error {
	u, err := url.Parse(address)
	if err != nil {
		return err
	}
	return cert.Leaf.VerifyHostname(u.Hostname())
}
