package native

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// handshake connects, sends one request and says whether TLS refused. In TLS 1.3
// a client learns that its certificate is refused only with the first read.
func handshake(t *testing.T, w *world, c *tls.Config) (tls.ConnectionState, error) {
	t.Helper()
	conn, err := tls.Dial("tcp", strings.TrimPrefix(w.base, "https://"), c)
	if err != nil {
		return tls.ConnectionState{}, err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	fmt.Fprintf(conn, "GET /v1/health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	resp, err := http.ReadResponse(bufio.NewReader(conn), nil)
	if err != nil {
		return conn.ConnectionState(), err
	}
	defer resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Errorf("the handshake succeeded and the request did not: %s", resp.Status)
	}
	_, err = io.Copy(io.Discard, resp.Body)
	return conn.ConnectionState(), err
}

func TestClientCertificates(t *testing.T) {
	w := newWorld(t, options{})
	const me = "spiffe://fr.example/service/test"
	now := time.UnixMilli(w.states.Now())
	for _, x := range []struct {
		name string
		site string
		cert certOptions
		ok   bool
	}{
		{name: "its site's CA", site: "fr", cert: certOptions{spiffe: me}, ok: true},
		{name: "another site's member", site: "jp", cert: certOptions{spiffe: "spiffe://jp.example/auditor/a/b"}, ok: true},
		{name: "unknown CA", site: "fr", cert: certOptions{spiffe: me, own: true}},
		{name: "another site's CA", site: "fr", cert: certOptions{spiffe: me, issuer: "de"}},
		{name: "node", site: "fr", cert: certOptions{spiffe: "spiffe://fr.example/node/node-fr-1"}},
		{name: "two URIs", site: "fr", cert: certOptions{spiffe: me, more: []string{"spiffe://fr.example/operator/test"}}},
		{name: "no URI", site: "fr"},
		{name: "no SPIFFE ID", site: "fr", cert: certOptions{spiffe: "https://fr.example/service/test"}},
		{name: "no role", site: "fr", cert: certOptions{spiffe: "spiffe://fr.example/test"}},
		{name: "upper case", site: "fr", cert: certOptions{spiffe: "spiffe://fr.example/Service/test"}},
		{name: "unknown trust domain", site: "fr", cert: certOptions{spiffe: "spiffe://uk.example/service/test"}},
		{name: "expired", site: "fr", cert: certOptions{spiffe: me, to: now.Add(-time.Minute)}},
		{name: "not valid yet", site: "fr", cert: certOptions{spiffe: me, from: now.Add(time.Minute)}},
		{name: "for servers only", site: "fr", cert: certOptions{spiffe: me, usage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}},
	} {
		t.Run(x.name, func(t *testing.T) {
			_, err := handshake(t, w, w.tlsConfig(w.certificate(x.site, x.cert)))
			if (err == nil) != x.ok {
				t.Errorf("got %v", err)
			}
			if !x.ok && !strings.Contains(fmt.Sprint(err), "tls: ") {
				t.Errorf("refused by something else than TLS: %v", err)
			}
		})
	}
	t.Run("none", func(t *testing.T) {
		if _, err := handshake(t, w, w.tlsConfig()); err == nil {
			t.Error("a client without a certificate was served")
		}
	})
}

func TestVersionsAndGroups(t *testing.T) {
	open, strict := newWorld(t, options{}), newWorld(t, options{hybridOnly: true})
	for _, x := range []struct {
		name    string
		w       *world
		change  func(*tls.Config)
		group   tls.CurveID
		refused bool
	}{
		{"TLS 1.2", open, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }, 0, true},
		{"what a client prefers", open, func(*tls.Config) {}, tls.X25519MLKEM768, false},
		{"classical where it may be", open, func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} }, tls.X25519, false},
		{"hybrid where it must be", strict, func(*tls.Config) {}, tls.X25519MLKEM768, false},
		{"the stronger hybrid", strict, func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.SecP384r1MLKEM1024} }, tls.SecP384r1MLKEM1024, false},
		{"classical where hybrid must be", strict, func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.X25519} }, 0, true},
		{"P-384 where hybrid must be", strict, func(c *tls.Config) { c.CurvePreferences = []tls.CurveID{tls.CurveP384} }, 0, true},
	} {
		t.Run(x.name, func(t *testing.T) {
			c := x.w.tlsConfig(x.w.certificate("fr", certOptions{spiffe: "spiffe://fr.example/service/test"}))
			x.change(c)
			cs, err := handshake(t, x.w, c)
			if (err != nil) != x.refused {
				t.Fatalf("got %v", err)
			}
			if err == nil && (cs.Version != tls.VersionTLS13 || cs.CurveID != x.group) {
				t.Errorf("version %x, group %v", cs.Version, cs.CurveID)
			}
		})
	}
}

// TestWithoutTLS holds that the handler itself insists on an identity.
func TestWithoutTLS(t *testing.T) {
	w := newWorld(t, options{})
	r := httptest.NewRecorder()
	w.server.ServeHTTP(r, httptest.NewRequest("GET", "/v1/status", nil))
	answer{t: t, status: r.Code, header: r.Header(), body: r.Body.Bytes()}.problem(kms.Unauthenticated, 401)
}

func TestIdentityIsVerifiedAgain(t *testing.T) {
	w := newWorld(t, options{})
	cert := w.certificate("fr", certOptions{spiffe: "spiffe://fr.example/operator/test", to: time.UnixMilli(w.states.Now()).Add(time.Hour)})
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	ctx := w.server.HTTPServer().ConnContext(t.Context(), nil)
	ask := func() int {
		q := httptest.NewRequestWithContext(ctx, "GET", "/v1/status", nil)
		q.TLS = &tls.ConnectionState{PeerCertificates: []*x509.Certificate{leaf}}
		r := httptest.NewRecorder()
		w.server.ServeHTTP(r, q)
		return r.Code
	}
	if got := ask(); got != 200 {
		t.Fatalf("status %d", got)
	}
	w.states.Advance(2 * time.Hour) // past the certificate's end
	if got := ask(); got != 200 {
		t.Errorf("status %d before the verification is due", got)
	}
	p := ctx.Value(connKey{}).(*peer)
	p.last.Store(&verified{p.last.Load().id, time.Now().Add(-time.Second)})
	if got := ask(); got != 401 {
		t.Errorf("status %d with an expired certificate on an open connection", got)
	}
}

// TestLimitsOfAConnection holds that no client can keep a connection for nothing.
func TestLimitsOfAConnection(t *testing.T) {
	s := New(Config{}).HTTPServer()
	if s.ReadHeaderTimeout != HeaderTimeout || s.ReadTimeout != ReadTimeout || s.WriteTimeout <= RequestTimeout ||
		s.IdleTimeout != IdleTimeout || s.MaxHeaderBytes == 0 || s.MaxHeaderBytes > 64<<10 {
		t.Errorf("%+v", s)
	}
	if HeaderTimeout <= 0 || ReadTimeout <= 0 || IdleTimeout <= 0 {
		t.Error("a limit is not set")
	}
}

// TestSlowHeaders shortens the limit and holds that a connection which never
// finishes its headers is closed.
func TestSlowHeaders(t *testing.T) {
	s := New(Config{}).HTTPServer()
	s.ReadHeaderTimeout = 50 * time.Millisecond
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	served := make(chan error, 1)
	go func() { served <- s.Serve(l) }()
	conn := must(net.Dial("tcp", l.Addr().String()))
	defer conn.Close()
	fmt.Fprint(conn, "GET / HTTP/1.1\r\nX: ")
	if err := conn.SetReadDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	var timeout net.Error
	if _, err := io.ReadAll(conn); errors.As(err, &timeout) && timeout.Timeout() {
		t.Error("the connection is still open")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		t.Error(err)
	}
}

func TestHTTP2(t *testing.T) {
	w := newWorld(t, options{})
	transport := &http.Transport{TLSClientConfig: w.tlsConfig(w.certificate("fr", certOptions{spiffe: "spiffe://fr.example/operator/test"})), ForceAttemptHTTP2: true}
	defer transport.CloseIdleConnections()
	resp, err := (&http.Client{Transport: transport}).Get(w.base + "/v1/status")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.ProtoMajor != 2 || resp.StatusCode != 200 {
		t.Errorf("%s %s", resp.Proto, resp.Status)
	}
}
