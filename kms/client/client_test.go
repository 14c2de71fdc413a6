package client

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// pki is a CA and a pair for both ends.
type pki struct {
	ca   *x509.Certificate
	pair tls.Certificate
}

func newPKI(t testing.TB) pki {
	t.Helper()
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	ca := must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, template, template, key.Public(), key))))
	leafKey := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der := must(x509.CreateCertificate(rand.Reader, leaf, ca, leafKey.Public(), key))
	return pki{ca, tls.Certificate{Certificate: [][]byte{der}, PrivateKey: leafKey}}
}

func (p pki) pool() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(p.ca)
	return pool
}

// node is a server that answers as its script says and remembers what it saw.
type node struct {
	*httptest.Server
	mu     sync.Mutex
	keys   []string // idempotency keys, one for each request
	paths  []string
	bodies []string
}

// newNode serves; answer is called for each request with its number from 0.
func newNode(t testing.TB, p pki, answer func(n int, w http.ResponseWriter, r *http.Request)) *node {
	t.Helper()
	x := &node{}
	x.Server = httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		x.mu.Lock()
		n := len(x.keys)
		x.keys = append(x.keys, r.Header.Get("Idempotency-Key"))
		x.paths = append(x.paths, r.Method+" "+r.RequestURI)
		x.bodies = append(x.bodies, string(b))
		x.mu.Unlock()
		answer(n, w, r)
	}))
	x.TLS = &tls.Config{Certificates: []tls.Certificate{p.pair}, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: p.pool(), MinVersion: tls.VersionTLS13}
	x.Config.ErrorLog = log.New(io.Discard, "", 0)
	x.StartTLS()
	t.Cleanup(x.Close)
	return x
}

func (x *node) seen() []string {
	x.mu.Lock()
	defer x.mu.Unlock()
	return slices.Clone(x.keys)
}

func fine(_ int, w http.ResponseWriter, _ *http.Request) { _, _ = w.Write([]byte(`{"name":"k"}`)) }

// refuse answers with a problem.
func refuse(k kms.Kind) func(int, http.ResponseWriter, *http.Request) {
	return func(_ int, w http.ResponseWriter, _ *http.Request) { writeProblem(w, k) }
}

func writeProblem(w http.ResponseWriter, k kms.Kind) {
	p := wire.NewProblem(&kms.Error{Kind: k, Msg: "what happened", Fix: "what to do"}, "r1")
	w.Header().Set("Content-Type", wire.ProblemType)
	w.WriteHeader(p.Status)
	_ = json.NewEncoder(w).Encode(p)
}

func newClient(t testing.TB, p pki, cfg Config, nodes ...*node) *Client {
	t.Helper()
	for _, n := range nodes {
		cfg.Addresses = append(cfg.Addresses, n.URL)
	}
	if cfg.TLS == nil {
		cfg.TLS = &tls.Config{RootCAs: p.pool(), Certificates: []tls.Certificate{p.pair}}
	}
	c, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func create(c *Client) (wire.Key, error) {
	return c.CreateKey(context.Background(), "ring", wire.CreateKeyRequest{Name: "k", Purpose: "mac"})
}

// deadAddress is one where nobody listens.
func deadAddress(t testing.TB) string {
	t.Helper()
	l := must(net.Listen("tcp", "127.0.0.1:0"))
	defer l.Close()
	return "https://" + l.Addr().String()
}

func TestFailover(t *testing.T) {
	p := newPKI(t)
	t.Run("dial", func(t *testing.T) {
		b := newNode(t, p, fine)
		c := newClient(t, p, Config{Addresses: []string{deadAddress(t), b.URL}})
		if k, err := create(c); err != nil || k.Name != "k" {
			t.Error(k, err)
		}
	})
	for _, k := range []kms.Kind{kms.Unavailable, kms.NotResident, kms.Unknown, kms.Stale, kms.ReadOnly} {
		t.Run(k.String(), func(t *testing.T) {
			a, b := newNode(t, p, refuse(k)), newNode(t, p, fine)
			c := newClient(t, p, Config{}, a, b)
			if _, err := create(c); err != nil {
				t.Fatal(err)
			}
			ka, kb := a.seen(), b.seen()
			if len(ka) != 1 || len(kb) != 1 || ka[0] != kb[0] || ka[0] == "" {
				t.Errorf("idempotency keys %q and %q", ka, kb)
			}
			if _, err := create(c); err != nil || b.seen()[1] == kb[0] {
				t.Errorf("another call had the key %q too: %v", kb[0], err)
			}
		})
	}
	t.Run("connection lost", func(t *testing.T) {
		a := newNode(t, p, func(int, http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
		b := newNode(t, p, fine)
		if _, err := create(newClient(t, p, Config{}, a, b)); err != nil || a.seen()[0] != b.seen()[0] {
			t.Error(err, a.seen(), b.seen())
		}
	})
	t.Run("later, the same node", func(t *testing.T) {
		a := newNode(t, p, func(n int, w http.ResponseWriter, r *http.Request) {
			if n < 2 {
				writeProblem(w, kms.Unavailable)
				return
			}
			fine(n, w, r)
		})
		if _, err := create(newClient(t, p, Config{}, a)); err != nil || len(a.seen()) != 3 {
			t.Error(err, a.seen())
		}
	})
}

// TestEveryKind holds that each kind comes back as itself, with its words, and
// that no refusal is tried again.
func TestEveryKind(t *testing.T) {
	p := newPKI(t)
	tries := map[kms.Kind]int{kms.Unavailable: 2, kms.Unknown: 2, kms.Stale: 2, kms.ReadOnly: 2}
	for k := kms.Internal; !strings.HasPrefix(k.String(), "kind-"); k++ {
		a := newNode(t, p, refuse(k))
		_, err := create(newClient(t, p, Config{Attempts: 2}, a))
		var e *kms.Error
		if !errors.As(err, &e) || e.Kind != k {
			t.Errorf("%v came back as %v (%v)", k, kms.KindOf(err), err)
			continue
		}
		if k != kms.Internal && (e.Msg != "what happened" || e.Fix != "what to do") {
			t.Errorf("%v: %+v", k, e)
		}
		if want := max(tries[k], 1); len(a.seen()) != want {
			t.Errorf("%v: %d tries, want %d", k, len(a.seen()), want)
		}
	}
}

func TestUnknownIsNotForgotten(t *testing.T) {
	p := newPKI(t)
	a, b := newNode(t, p, refuse(kms.Unknown)), newNode(t, p, refuse(kms.Unavailable))
	if _, err := create(newClient(t, p, Config{Attempts: 2}, a, b)); !errors.Is(err, kms.Unknown) {
		t.Errorf("after unknown and unavailable: %v", err)
	}
	c := newClient(t, p, Config{Attempts: 2, Addresses: []string{a.URL, deadAddress(t)}})
	if _, err := create(c); !errors.Is(err, kms.Unknown) {
		t.Errorf("after unknown and a dead node: %v", err)
	}
	// A final answer to the retry is the outcome.
	d := newNode(t, p, refuse(kms.Exists))
	if _, err := create(newClient(t, p, Config{}, a, d)); !errors.Is(err, kms.Exists) {
		t.Errorf("after unknown and exists: %v", err)
	}
	// A write that broke off may have been made; a read was not lost.
	broken := newNode(t, p, func(int, http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
	c = newClient(t, p, Config{Attempts: 1}, broken)
	if _, err := create(c); !errors.Is(err, kms.Unknown) {
		t.Errorf("a write that broke off: %v", err)
	}
	if _, err := c.Nodes(t.Context()); !errors.Is(err, kms.Unavailable) {
		t.Errorf("a read that broke off: %v", err)
	}
	// net/http sends it again on another connection where one that was used before breaks: what
	// comes of that says nothing about the first time.
	for name, next := range map[string]func(x *node, w http.ResponseWriter){
		"a node that is gone":      func(x *node, _ http.ResponseWriter) { t.Errorf("%s took a request", x.URL) },
		"a node that is not ready": func(_ *node, w http.ResponseWriter) { writeProblem(w, kms.Unavailable) },
	} {
		var restarted *node
		restarted = newNode(t, p, func(n int, w http.ResponseWriter, r *http.Request) {
			switch n {
			case 0:
				fine(n, w, r)
			case 1:
				if name == "a node that is gone" {
					_ = restarted.Listener.Close()
				}
				panic(http.ErrAbortHandler)
			default:
				next(restarted, w)
			}
		})
		c := newClient(t, p, Config{Attempts: 1}, restarted)
		if _, err := create(c); err != nil {
			t.Fatal(err)
		}
		if _, err := create(c); !errors.Is(err, kms.Unknown) {
			t.Errorf("a write that broke off at %s: %v", name, err)
		}
	}
	// So may one whose answer broke off.
	half := newNode(t, p, func(_ int, w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", "100")
		_, _ = w.Write([]byte(`{"name":`))
	})
	if _, err := create(newClient(t, p, Config{Attempts: 1}, half)); !errors.Is(err, kms.Unknown) {
		t.Errorf("an answer that broke off: %v", err)
	}
}

func TestDeadline(t *testing.T) {
	p := newPKI(t)
	released := make(chan struct{})
	a := newNode(t, p, func(_ int, _ http.ResponseWriter, r *http.Request) {
		select {
		case <-r.Context().Done():
			panic(http.ErrAbortHandler) // an empty 200 could still reach a client that is hanging up
		case <-released:
		}
	})
	defer close(released)
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	started := time.Now()
	_, err := newClient(t, p, Config{}, a).Nodes(ctx)
	if !errors.Is(err, kms.Unavailable) || !strings.Contains(err.Error(), "in time") || time.Since(started) > 10*time.Second {
		t.Errorf("%v after %v", err, time.Since(started))
	}
	if len(a.seen()) != 1 {
		t.Errorf("%d tries within one deadline", len(a.seen()))
	}
	// The timeout of a try is not that of the call.
	b := newNode(t, p, fine)
	if _, err := create(newClient(t, p, Config{Timeout: 100 * time.Millisecond}, a, b)); err != nil {
		t.Error(err)
	}
	// The deadline ends the pause between rounds too.
	ctx, cancel = context.WithTimeout(t.Context(), 250*time.Millisecond)
	defer cancel()
	down := newNode(t, p, refuse(kms.Unavailable))
	started = time.Now()
	if _, err := newClient(t, p, Config{Attempts: 1000}, down).Nodes(ctx); !errors.Is(err, kms.Unavailable) || time.Since(started) > 10*time.Second {
		t.Errorf("%v after %v", err, time.Since(started))
	}
	ctx, cancel = context.WithCancel(t.Context())
	cancel()
	if _, err := newClient(t, p, Config{}, b).Nodes(ctx); !errors.Is(err, context.Canceled) || len(b.seen()) != 1 {
		t.Errorf("cancelled: %v, %d requests", err, len(b.seen()))
	}
}

func TestAt(t *testing.T) {
	p := newPKI(t)
	a, b := newNode(t, p, fine), newNode(t, p, fine)
	c := newClient(t, p, Config{}, a)
	at, err := c.At(b.URL + "/")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := create(at); err != nil || len(a.seen()) != 0 || len(b.seen()) != 1 {
		t.Error(err, a.seen(), b.seen())
	}
	for _, bad := range []string{"", "http://x", "127.0.0.1:1", "https://", ":"} {
		if _, err := c.At(bad); !errors.Is(err, kms.Invalid) {
			t.Errorf("At(%q): %v", bad, err)
		}
		if _, err := New(Config{Addresses: []string{bad}, TLS: &tls.Config{Certificates: []tls.Certificate{p.pair}}}); !errors.Is(err, kms.Invalid) {
			t.Errorf("New(%q): %v", bad, err)
		}
	}
	if _, err := New(Config{}); !errors.Is(err, kms.Invalid) || !strings.Contains(err.Error(), "CONCLAVE_ADDR") {
		t.Error(err)
	}
	if _, err := New(Config{Addresses: []string{a.URL}, TLS: &tls.Config{}}); !errors.Is(err, kms.Invalid) {
		t.Error(err)
	}
}

func TestCertificateErrors(t *testing.T) {
	p, other := newPKI(t), newPKI(t)
	a := newNode(t, p, fine)
	for _, x := range []struct {
		name string
		tls  *tls.Config
		says string
	}{
		{"unknown CA", &tls.Config{RootCAs: other.pool(), Certificates: []tls.Certificate{p.pair}}, "CONCLAVE_CACERT"},
		{"another name", &tls.Config{RootCAs: p.pool(), Certificates: []tls.Certificate{p.pair}, ServerName: "other.example"}, "is not for that name"},
		{"certificate of another CA", &tls.Config{RootCAs: p.pool(), GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return &other.pair, nil }}, "refused this client's certificate"},
	} {
		t.Run(x.name, func(t *testing.T) {
			c := newClient(t, p, Config{TLS: x.tls}, a)
			_, err := c.Nodes(t.Context())
			if !errors.Is(err, kms.Unauthenticated) || !strings.Contains(err.Error(), x.says) {
				t.Errorf("%v: %v", kms.KindOf(err), err)
			}
		})
	}
	if n := len(a.seen()); n != 0 {
		t.Errorf("%d requests were served", n)
	}
}

func TestAnswersThatAreNotOurs(t *testing.T) {
	p := newPKI(t)
	for _, x := range []struct {
		name   string
		status int
		body   string
		says   string
	}{
		{"HTML error", 502, "<html>bad gateway</html>", "502"},
		{"problem of somebody else", 404, `{"type":"about:blank","title":"Not Found"}`, "Not Found"},
		{"JSON error", 400, `{"errors":["x"]}`, "is it a Conclave node?"},
		{"HTML success", 200, "<html>welcome</html>", "not understood"},
		{"redirect", 302, "", "302"},
	} {
		t.Run(x.name, func(t *testing.T) {
			a := newNode(t, p, func(_ int, w http.ResponseWriter, _ *http.Request) {
				w.Header().Set("Location", "https://elsewhere.example/")
				w.WriteHeader(x.status)
				_, _ = w.Write([]byte(x.body))
			})
			_, err := create(newClient(t, p, Config{}, a))
			if !errors.Is(err, kms.Internal) || !strings.Contains(err.Error(), x.says) || len(a.seen()) != 1 {
				t.Errorf("%v: %v, %d tries", kms.KindOf(err), err, len(a.seen()))
			}
		})
	}
}

func TestReady(t *testing.T) {
	p := newPKI(t)
	a := newNode(t, p, func(n int, w http.ResponseWriter, _ *http.Request) {
		if n == 0 {
			w.WriteHeader(503)
			_, _ = w.Write([]byte(`{"ready":false,"reasons":["the device does not answer"]}`))
			return
		}
		_, _ = w.Write([]byte(`{"ready":true}`))
	})
	c := newClient(t, p, Config{}, a)
	r, err := c.Ready(t.Context())
	if !errors.Is(err, kms.Unavailable) || !strings.Contains(err.Error(), "the device does not answer") || r.Ready || len(a.seen()) != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	if r, err := c.Ready(t.Context()); err != nil || !r.Ready {
		t.Errorf("%+v, %v", r, err)
	}
	b := newNode(t, p, refuse(kms.Unavailable))
	if _, err := newClient(t, p, Config{Attempts: 1}, b).Ready(t.Context()); !errors.Is(err, kms.Unavailable) {
		t.Error(err)
	}
}

func TestRequests(t *testing.T) {
	p := newPKI(t)
	a := newNode(t, p, fine)
	c := newClient(t, p, Config{Addresses: []string{a.URL + "/prefix/"}})
	if _, err := c.Keyring(t.Context(), "a b/c"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Key("r", "k").PublicKey(t.Context(), 7); err != nil {
		t.Fatal(err)
	}
	if _, err := c.CreateKeyring(t.Context(), wire.CreateKeyringRequest{Name: "x"}, WithIdempotencyKey("mine")); err != nil {
		t.Fatal(err)
	}
	if b, err := c.Evidence(t.Context(), "id"); err != nil || string(b) != `{"name":"k"}` {
		t.Errorf("%q, %v", b, err)
	}
	want := []string{"GET /prefix/v1/keyrings/a%20b%2Fc", "GET /prefix/v1/keyrings/r/keys/k/public-key?version=7", "POST /prefix/v1/keyrings", "GET /prefix/v1/proposals/id/evidence"}
	if !slices.Equal(a.paths, want) {
		t.Errorf("%q", a.paths)
	}
	if keys := a.seen(); !slices.Equal(keys, []string{"", "", "mine", ""}) {
		t.Errorf("idempotency keys %q", keys)
	}
	if err := c.Do(t.Context(), "POST", "/v1/x", make(chan int), nil); !errors.Is(err, kms.Invalid) {
		t.Error(err)
	}
}

func TestLoadTLS(t *testing.T) {
	p := newPKI(t)
	dir := t.TempDir()
	write := func(name, kind string, b []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: b}), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	ca := write("ca", "CERTIFICATE", p.ca.Raw)
	cert := write("cert", "CERTIFICATE", p.pair.Certificate[0])
	key := write("key", "PRIVATE KEY", must(x509.MarshalPKCS8PrivateKey(p.pair.PrivateKey)))
	empty := write("empty", "NOTHING", nil)
	c, err := LoadTLS(ca, cert, key)
	if err != nil || c.MinVersion != tls.VersionTLS13 || !slices.Equal(c.CurvePreferences, HybridGroups()) {
		t.Fatal(c, err)
	}
	for _, x := range []struct{ ca, cert, key, says string }{
		{"", cert, key, "CONCLAVE_CACERT"}, {ca, "", key, "CONCLAVE_CLIENT_CERT"}, {ca, cert, "", "CONCLAVE_CLIENT_KEY"},
		{empty, cert, key, "holds no PEM certificate"}, {dir + "/none", cert, key, "CONCLAVE_CACERT"},
		{ca, cert, ca, "CONCLAVE_CLIENT_KEY"}, {ca, empty, key, "CONCLAVE_CLIENT_CERT"},
	} {
		if _, err := LoadTLS(x.ca, x.cert, x.key); !errors.Is(err, kms.Invalid) || !strings.Contains(err.Error(), x.says) {
			t.Errorf("%v does not say %q", err, x.says)
		}
	}
	// The groups are hybrid only: a node without them is not spoken to.
	a := newNode(t, p, fine)
	classical := a.TLS.Clone()
	classical.CurvePreferences = []tls.CurveID{tls.X25519}
	a.TLS.GetConfigForClient = func(*tls.ClientHelloInfo) (*tls.Config, error) { return classical, nil }
	if _, err := newClient(t, p, Config{TLS: c, Attempts: 1}, a).Nodes(t.Context()); err == nil {
		t.Error("a node without hybrid key exchange was spoken to")
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// TestProposalPages goes through the pages of a list, and stops at one that is out of
// order.
func TestProposalPages(t *testing.T) {
	p := newPKI(t)
	pages := map[string]wire.Proposals{
		"":                               {Proposals: []wire.Proposal{{ID: "c"}, {ID: "b"}}, Next: 7},
		"before=7":                       {Proposals: []wire.Proposal{{ID: "a"}}},
		"action=rotate&limit=1":          {Proposals: []wire.Proposal{{ID: "c"}}, Next: 9},
		"before=5&target=key%2Fring%2Fk": {Proposals: []wire.Proposal{{ID: "c"}}, Next: 5},
	}
	n := newNode(t, p, func(_ int, w http.ResponseWriter, r *http.Request) {
		page, ok := pages[r.URL.RawQuery]
		if !ok {
			t.Errorf("asked for %q", r.URL.RawQuery)
		}
		_ = json.NewEncoder(w).Encode(page)
	})
	c := newClient(t, p, Config{}, n)
	for want, q := range map[string]wire.ProposalQuery{"cba": {}, "c": {Action: "rotate", Limit: 1}} {
		l, err := c.Proposals(t.Context(), q)
		got := ""
		for _, x := range l {
			got += x.ID
		}
		if err != nil || got != want {
			t.Errorf("%+v: %q, %v; want %q", q, got, err, want)
		}
	}
	if _, err := c.Proposals(t.Context(), wire.ProposalQuery{Target: "key/ring/k", Before: 5}); !errors.Is(err, kms.Internal) {
		t.Errorf("a page that goes back: %v", err)
	}
}
