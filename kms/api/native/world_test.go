package native

import (
	"bytes"
	"context"
	"crypto/ecdh"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/engine"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/test/fakedevice"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// world is a coalition of three sites in memory, whose node of fr serves the
// API on loopback over TLS.
type world struct {
	t      testing.TB
	states *statetest.World
	engine *engine.Engine
	device *fakedevice.Device // of fr; everything but its agreement and signing key
	log    *logStub
	base   string
	server *Server

	mu    sync.Mutex
	fresh time.Duration
	lost  error // what Propose answers after applying
	fail  error // what Propose answers instead of applying
}

// root is a node's agreement key from statetest as a device.
type root struct{ n *statetest.Node }

func (r root) AgreementKey() *ecdh.PublicKey { return r.n.Agreement.PublicKey() }
func (r root) ECDH(_ context.Context, peer *ecdh.PublicKey) ([]byte, error) {
	return r.n.Agreement.ECDH(peer)
}

// logStub is an access log that can break.
type logStub struct {
	mu   sync.Mutex
	last audit.Entry
	err  error
}

func (l *logStub) Append(_ context.Context, e audit.Entry) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.last = e
	return l.err
}

func (l *logStub) entry() audit.Entry {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.last
}

// The world is the cluster of its engine.
func (w *world) State() *state.State { return w.states.State() }

func (w *world) Fresh() time.Duration {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.fresh
}

func (w *world) Barrier(ctx context.Context) error { return ctx.Err() }

func (w *world) Propose(_ context.Context, raw []byte) (state.Result, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.fail != nil {
		return state.Result{}, w.fail
	}
	if err := w.states.State().Check(raw); err != nil {
		return state.Result{}, err
	}
	r := w.states.Apply(raw)
	return r, w.lost
}

func (w *world) set(f func(*world)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f(w)
}

// options of a world.
type options struct {
	access     string // Cedar text; default the engine's
	hybridOnly bool
	metrics    http.Handler
}

func newWorld(t testing.TB, o options) *world {
	t.Helper()
	if o.access == "" {
		o.access = engine.DefaultAccess()
	}
	w := &world{t: t, log: &logStub{}}
	w.states = statetest.New(t, statetest.Options{Access: []byte(o.access)})
	w.states.Advance(time.Second)
	w.device = must(fakedevice.New(ecdh.P256()))
	node := w.states.Node("node-fr-1")
	r := must(keyring.NewRoot(root{node}, pqc.SuiteID(node.Record.Suite), node.Seed))
	cache := must(keyring.NewCache(r, keyring.Limits{TTL: time.Hour, MaxKEKs: 16, MaxKeys: 64}))
	t.Cleanup(cache.Purge)
	w.engine = must(engine.New(engine.Config{
		Node: "node-fr-1", Cluster: w, Cache: cache, Root: r, Signer: node, Device: w.device, Log: w.log,
		Now: func() time.Time { return time.UnixMilli(w.states.Now()) }, Version: "test",
	}))
	w.server = New(Config{Engine: w.engine, Metrics: o.metrics})
	listener := must(net.Listen("tcp", "127.0.0.1:0"))
	cert := w.certificate("fr", certOptions{spiffe: "spiffe://fr.example/node/node-fr-1"})
	hs := w.server.HTTPServer()
	served := make(chan error, 1)
	go func() { served <- hs.Serve(tls.NewListener(listener, w.engine.ServerTLS(cert, o.hybridOnly))) }()
	t.Cleanup(func() {
		if err := hs.Close(); err != nil {
			t.Error(err)
		}
		<-served
	})
	w.base = "https://" + listener.Addr().String()
	return w
}

// found makes the keyring ring with one key of each purpose: enc, mac and sig.
func (w *world) found() {
	w.t.Helper()
	admin := w.client("operator")
	w.call(admin, "POST", "/v1/keyrings", wire.CreateKeyringRequest{Name: "ring", Residency: []string{"de", "fr", "jp"}, Policy: "standard"}).ok(nil)
	for name, purpose := range map[string]kms.Purpose{"enc": kms.Encrypt, "mac": kms.MAC, "sig": kms.Sign} {
		w.call(admin, "POST", "/v1/keyrings/ring/keys", wire.CreateKeyRequest{Name: name, Purpose: string(purpose)}).ok(nil)
	}
}

type certOptions struct {
	spiffe   string
	more     []string // further URI SANs
	issuer   string   // site whose CA signs; default: the site
	own      bool     // a CA that nobody knows signs
	from, to time.Time
	usage    []x509.ExtKeyUsage
}

// certificate issues a certificate by a site's CA, valid at the world's time and
// at the real one.
func (w *world) certificate(site string, o certOptions) tls.Certificate {
	w.t.Helper()
	ca := w.states.CA(site)
	if o.issuer != "" {
		ca = w.states.CA(o.issuer)
	}
	if o.own {
		key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
		parent := *ca.Certificate
		parent.PublicKey = key.Public()
		ca = &statetest.CA{Certificate: &parent, Key: key}
	}
	if o.from.IsZero() {
		o.from = ca.Certificate.NotBefore
	}
	if o.to.IsZero() {
		o.to = ca.Certificate.NotAfter
	}
	if o.usage == nil {
		o.usage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth}
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(2), NotBefore: o.from, NotAfter: o.to, KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: o.usage, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	for _, s := range append([]string{o.spiffe}, o.more...) {
		if s != "" {
			template.URIs = append(template.URIs, must(url.Parse(s)))
		}
	}
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	der := must(x509.CreateCertificate(rand.Reader, template, ca.Certificate, key.Public(), ca.Key))
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// tlsConfig is a client's, with or without a certificate.
func (w *world) tlsConfig(certs ...tls.Certificate) *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(w.states.CA("fr").Certificate)
	return &tls.Config{RootCAs: roots, Certificates: certs}
}

func (w *world) httpClient(c *tls.Config) *http.Client {
	transport := &http.Transport{TLSClientConfig: c}
	w.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
}

// client connects as somebody of fr.
func (w *world) client(role string) *http.Client {
	w.t.Helper()
	cert := w.certificate("fr", certOptions{spiffe: "spiffe://fr.example/" + role + "/test"})
	return w.httpClient(w.tlsConfig(cert))
}

// answer is one response, read.
type answer struct {
	t      testing.TB
	what   string
	status int
	header http.Header
	body   []byte
}

// call sends a request. body is a string as it is, anything else as JSON, nil for
// none; header holds names and values in turn, an empty value removes.
func (w *world) call(c *http.Client, method, path string, body any, header ...string) answer {
	w.t.Helper()
	var r io.Reader
	switch b := body.(type) {
	case nil:
	case string:
		r = strings.NewReader(b)
	default:
		r = bytes.NewReader(must(json.Marshal(b)))
	}
	req := must(http.NewRequestWithContext(w.t.Context(), method, w.base+path, r))
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
		if header[i+1] == "" {
			req.Header.Del(header[i])
		}
	}
	resp, err := c.Do(req)
	if err != nil {
		w.t.Fatalf("%s %s: %v", method, path, err)
	}
	defer resp.Body.Close()
	return answer{t: w.t, what: method + " " + path, status: resp.StatusCode, header: resp.Header, body: must(io.ReadAll(resp.Body))}
}

// ok decodes a successful answer into out, if there is one.
func (a answer) ok(out any) answer {
	a.t.Helper()
	if a.status != http.StatusOK {
		a.t.Fatalf("%s: %d %s", a.what, a.status, a.body)
	}
	if out != nil {
		if err := json.Unmarshal(a.body, out); err != nil {
			a.t.Fatalf("%s: %v: %s", a.what, err, a.body)
		}
	}
	return a
}

// problem checks that the answer is a problem document of the kind and status.
func (a answer) problem(k kms.Kind, status int) wire.Problem {
	a.t.Helper()
	var p wire.Problem
	if err := json.Unmarshal(a.body, &p); err != nil {
		a.t.Fatalf("%s: %v: %s", a.what, err, a.body)
	}
	if got := a.header.Get("Content-Type"); got != wire.ProblemType {
		a.t.Errorf("%s: media type %q", a.what, got)
	}
	if a.status != status || p.Status != status || p.Kind() != k || p.Title == "" {
		a.t.Errorf("%s: status %d, %+v; want %v, %d", a.what, a.status, p, k, status)
	}
	if p.Instance == "" || p.Instance != a.header.Get("X-Request-Id") {
		a.t.Errorf("%s: instance %q, X-Request-Id %q", a.what, p.Instance, a.header.Get("X-Request-Id"))
	}
	return p
}

// statement is a custodian's signed verdict.
func (w *world) statement(id, custodian string, v approval.Verdict) wire.Statement {
	w.t.Helper()
	s := w.states.Statement(id, custodian, v)
	return wire.Statement{Proposal: s.Proposal, Verdict: string(s.Verdict), Custodian: s.Custodian, Credential: s.Credential, Signature: s.Signature}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}
