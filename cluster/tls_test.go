package cluster_test

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/cluster/clustertest"
	"github.com/conclave-kms/conclave/kms"
)

// greet connects to a member as a client with the given certificate and waits for
// the greeting of the forward protocol: without it the member has not accepted.
func greet(t *testing.T, address string, cert tls.Certificate, change func(*tls.Config)) error {
	t.Helper()
	cfg := &tls.Config{Certificates: []tls.Certificate{cert}, InsecureSkipVerify: true, MinVersion: tls.VersionTLS13,
		NextProtos: []string{"conclave-forward/1"}, CurvePreferences: []tls.CurveID{tls.X25519MLKEM768}}
	if change != nil {
		change(cfg)
	}
	raw, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	if err := raw.SetDeadline(time.Now().Add(clustertest.Patience)); err != nil {
		t.Fatal(err)
	}
	conn := tls.Client(raw, cfg)
	if err := conn.Handshake(); err != nil {
		return err
	}
	_, err = io.ReadFull(conn, make([]byte, 4))
	return err
}

// A member accepts other nodes of the cluster and nobody else.
func TestAccept(t *testing.T) {
	c := clustertest.Prepare(t, clustertest.Options{})
	c.Restart(0)
	de, fr := c.Members[0], c.Members[1]
	if de.Site != "de" || fr.Site != "fr" {
		t.Fatal("the members are not in order")
	}
	uri := clustertest.NodeURI(fr.Site, fr.ID)
	own := fr.Certificate
	stranger := clustertest.NewCA(t, "CA of fr") // the same name, another key
	issue := func(ca *clustertest.CA, uris ...string) tls.Certificate { return ca.Issue(t, uris...) }
	expired := &x509.Certificate{NotBefore: time.Now().Add(-2 * time.Hour), NotAfter: time.Now().Add(-time.Hour),
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}
	codeSigning := &x509.Certificate{ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning}}
	cases := []struct {
		name   string
		cert   tls.Certificate
		change func(*tls.Config)
		ok     bool
	}{
		{name: "a node", cert: own, ok: true},
		{name: "a node on the other hybrid group", cert: own, ok: true,
			change: func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.SecP384r1MLKEM1024} }},
		{name: "a renewed certificate of a node", cert: issue(c.CAs["fr"], uri), ok: true},
		{name: "no certificate", change: func(c *tls.Config) { c.Certificates = nil }},
		{name: "a service of the site", cert: issue(c.CAs["fr"], "spiffe://fr.example/service/billing")},
		{name: "an operator of the site", cert: issue(c.CAs["fr"], "spiffe://fr.example/operator/ops")},
		{name: "a node that is none", cert: issue(c.CAs["fr"], "spiffe://fr.example/node/node-fr-9")},
		{name: "a node below a node", cert: issue(c.CAs["fr"], uri+"/x")},
		{name: "this node's own name", cert: issue(c.CAs["de"], clustertest.NodeURI(de.Site, de.ID))},
		{name: "another site's CA", cert: issue(c.CAs["jp"], uri)},
		{name: "another site's CA and trust domain", cert: issue(c.CAs["jp"], "spiffe://jp.example/node/"+fr.ID)},
		{name: "an unknown CA of the same name", cert: issue(stranger, uri)},
		{name: "two URI names", cert: issue(c.CAs["fr"], uri, "spiffe://fr.example/service/billing")},
		{name: "no URI name", cert: issue(c.CAs["fr"])},
		{name: "an encoded name", cert: issue(c.CAs["fr"], "spiffe://fr.example/node/%6eode-fr-1")},
		{name: "a name with a query", cert: issue(c.CAs["fr"], uri+"?x")},
		{name: "an expired certificate", cert: c.CAs["fr"].IssueFrom(t, expired, uri)},
		{name: "a certificate for something else", cert: c.CAs["fr"].IssueFrom(t, codeSigning, uri)},
		{name: "TLS 1.2", cert: own, change: func(c *tls.Config) {
			c.MinVersion, c.MaxVersion, c.CurvePreferences = tls.VersionTLS12, tls.VersionTLS12, nil
		}},
		{name: "X25519 alone", cert: own, change: func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} }},
		{name: "P-384 alone", cert: own, change: func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP384} }},
		{name: "no protocol", cert: own, change: func(c *tls.Config) { c.NextProtos = nil }},
		{name: "another protocol", cert: own, change: func(c *tls.Config) { c.NextProtos = []string{"h2"} }},
	}
	for _, tc := range cases {
		t.Run(tc.name, func(t *testing.T) {
			err := greet(t, de.Address, tc.cert, tc.change)
			var timeout net.Error
			if (err == nil) != tc.ok || errors.As(err, &timeout) && timeout.Timeout() {
				t.Errorf("accepted: %v (%v), want %v", err == nil, err, tc.ok)
			}
		})
	}
}

// A connection ends when the peer's certificate does.
func TestConnectionEndsWithCertificate(t *testing.T) {
	c := clustertest.Prepare(t, clustertest.Options{})
	c.Restart(0)
	fr := c.Members[1]
	end := time.Now().Add(3 * time.Second)
	cert := c.CAs["fr"].IssueFrom(t, &x509.Certificate{NotBefore: time.Now().Add(-time.Minute), NotAfter: end,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}, clustertest.NodeURI(fr.Site, fr.ID))
	conn, err := tls.Dial("tcp", c.Members[0].Address, &tls.Config{Certificates: []tls.Certificate{cert}, InsecureSkipVerify: true,
		NextProtos: []string{"conclave-forward/1"}, CurvePreferences: []tls.CurveID{tls.X25519MLKEM768}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(clustertest.Patience)); err != nil {
		t.Fatal(err)
	}
	n, err := io.Copy(io.Discard, conn) // the greeting, then nothing until it closes
	var timeout net.Error
	if n == 0 || errors.As(err, &timeout) && timeout.Timeout() {
		t.Errorf("%d bytes, %v", n, err)
	}
	if early := time.Until(end.Truncate(time.Second)); early > 0 {
		t.Errorf("it closed %v too early", early)
	}
}

// A member that dials one node and reaches another, with a good certificate of
// its own, does not speak to it.
func TestWrongNodeAtAddress(t *testing.T) {
	// node-de-1 reaches node-jp-1 where node-fr-1 should be; the others reach nobody.
	var c *clustertest.Cluster
	c = clustertest.Prepare(t, clustertest.Options{Config: func(i int, cfg *cluster.Config) {
		cfg.Dial = func(ctx context.Context, address string) (net.Conn, error) {
			if i != 0 || address != c.Members[1].Address {
				return nil, errors.New("cut off")
			}
			return new(net.Dialer).DialContext(ctx, "tcp", c.Members[2].Address)
		}
	}})
	de := c.Restart(0)
	c.Restart(2)
	c.Until("an election without votes", func() bool { return de.Status().State == "candidate" })
	ctx, cancel := context.WithTimeout(t.Context(), 3*clustertest.Timing().Heartbeat)
	defer cancel()
	if _, err := de.Propose(ctx, c.Tick(0)); !errors.Is(err, kms.Unavailable) {
		t.Errorf("got %v", err)
	}
	for _, p := range de.Status().Peers {
		if p.Group != "" {
			t.Errorf("a handshake with %s was accepted", p.ID)
		}
	}
}

// Status shows that connections between nodes are hybrid.
func TestGroupInStatus(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{})
	leader := c.Leader()
	c.SameState(c.Propose(leader, c.Tick(leader)).Index)
	for _, p := range c.Node(leader).Status().Peers {
		want := "X25519MLKEM768"
		if p.ID == c.Members[leader].ID {
			want = ""
		}
		if p.Group != want || p.Suffrage != "voter" || p.Address == "" || p.Site == "" {
			t.Errorf("peer %+v, want group %q", p, want)
		}
	}
}

// A node does not start with a certificate that its peers would refuse.
func TestOwnCertificate(t *testing.T) {
	c := clustertest.Prepare(t, clustertest.Options{})
	for name, cert := range map[string]tls.Certificate{
		"none":            {},
		"another node's":  c.Members[1].Certificate,
		"a service's":     c.CAs["de"].Issue(t, "spiffe://de.example/service/x"),
		"of another CA":   c.CAs["fr"].Issue(t, clustertest.NodeURI("de", "node-de-1")),
		"of another site": c.CAs["de"].Issue(t, "spiffe://fr.example/node/node-de-1"),
	} {
		cfg := c.Config(0)
		cfg.Certificate = cert
		if n, err := cluster.Open(t.Context(), cfg); err == nil {
			_ = n.Close()
			t.Errorf("%s: the node started", name)
		}
	}
}
