// Package client is the Go client of Conclave's native API: mutual TLS 1.3 with
// hybrid key exchange, failover between nodes, and retries that are safe because
// every write carries an idempotency key.
package client

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptrace"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
)

// Config says which cluster to speak to and as whom.
type Config struct {
	// Addresses are https URLs of nodes' APIs, tried in this order.
	Addresses []string
	// TLS holds the caller's certificate and the CAs of the sites; LoadTLS makes one.
	TLS *tls.Config
	// Attempts bounds the tries of one call over all addresses; 0 means three
	// for each address.
	Attempts int
	// Timeout bounds one try; 0 means 30 seconds.
	Timeout time.Duration
	// Local has reads answered from what a node itself knows, which may be outdated,
	// and so also by one that is cut off from the cluster.
	Local bool
}

// Client speaks to a cluster. It is safe for concurrent use.
type Client struct {
	bases    []*url.URL
	http     *http.Client
	attempts int
	timeout  time.Duration
	local    bool
}

// New checks the configuration; it does not connect.
func New(cfg Config) (*Client, error) {
	if len(cfg.Addresses) == 0 {
		return nil, kms.Errorf(kms.Invalid, "no address of a node is given; set CONCLAVE_ADDR to a node's https URL")
	}
	c := &Client{attempts: cfg.Attempts, timeout: cfg.Timeout, local: cfg.Local}
	for _, a := range cfg.Addresses {
		u, err := url.Parse(strings.TrimRight(a, "/"))
		if err != nil || u.Scheme != "https" || u.Host == "" {
			return nil, kms.Errorf(kms.Invalid, "address %q is not an https URL", a)
		}
		c.bases = append(c.bases, u)
	}
	if cfg.TLS == nil || len(cfg.TLS.Certificates) == 0 && cfg.TLS.GetClientCertificate == nil {
		return nil, kms.Errorf(kms.Invalid, "no client certificate is given; the API takes mutual TLS only")
	}
	if c.attempts == 0 {
		c.attempts = 3 * len(c.bases)
	}
	if c.timeout == 0 {
		c.timeout = 30 * time.Second
	}
	tlsConfig := cfg.TLS.Clone()
	tlsConfig.MinVersion = tls.VersionTLS13
	c.http = &http.Client{
		Transport: &http.Transport{
			TLSClientConfig:     tlsConfig,
			DialContext:         (&net.Dialer{Timeout: 3 * time.Second}).DialContext,
			TLSHandshakeTimeout: 3 * time.Second,
			MaxIdleConnsPerHost: 64,
			IdleConnTimeout:     90 * time.Second,
		},
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}
	return c, nil
}

// Close drops idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// At returns a client for the same caller that speaks to one address only.
func (c *Client) At(address string) (*Client, error) {
	u, err := url.Parse(strings.TrimRight(address, "/"))
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return nil, kms.Errorf(kms.Invalid, "address %q is not an https URL", address)
	}
	return &Client{bases: []*url.URL{u}, http: c.http, attempts: 3, timeout: c.timeout, local: c.local}, nil
}

// LocalView returns a client for the same nodes and caller whose reads show what a
// node itself knows; see Config.Local.
func (c *Client) LocalView() *Client {
	view := *c
	view.local = true
	return &view
}

type callOptions struct {
	query       url.Values
	idempotency string
	local       bool
}

// Option changes one call.
type Option func(*callOptions)

// WithIdempotencyKey sets the idempotency key of a write (1 to 128 bytes), so
// that the caller can repeat the write after a crash of its own. Without it
// every call draws a fresh one for its own retries.
func WithIdempotencyKey(key string) Option { return func(o *callOptions) { o.idempotency = key } }

func withQuery(name, value string) Option {
	return func(o *callOptions) {
		if o.query == nil {
			o.query = url.Values{}
		}
		o.query.Set(name, value)
	}
}

// Do carries out one call and decodes the answer into out. in nil sends no
// body; out nil discards the answer; an *[]byte takes it as it is. Errors are *kms.Error with the kind that
// the node named; a node that cannot be reached is kms.Unavailable.
func (c *Client) Do(ctx context.Context, method, path string, in, out any, opts ...Option) error {
	var o callOptions
	for _, opt := range opts {
		opt(&o)
	}
	var body []byte
	if in != nil {
		var err error
		if body, err = json.Marshal(in); err != nil {
			return kms.Wrap(kms.Invalid, err, "the request cannot be encoded", "")
		}
	}
	o.local = c.local && method == http.MethodGet
	if method != http.MethodGet && o.idempotency == "" {
		o.idempotency = newIdempotencyKey()
	}
	var last error
	hopeless := 0 // addresses that will give no better answer
	skip := make([]bool, len(c.bases))
	for attempt := range c.attempts {
		i := attempt % len(c.bases)
		if attempt > 0 && i == 0 {
			if err := pause(ctx, attempt/len(c.bases)); err != nil {
				return last
			}
		}
		if skip[i] {
			continue
		}
		next, err := c.try(ctx, c.bases[i], method, path, body, out, o)
		if err == nil {
			return nil
		}
		if next == final {
			return err
		}
		last = preferred(last, err)
		if next == elsewhere {
			skip[i] = true
			hopeless++
		}
		if hopeless == len(c.bases) || ctx.Err() != nil {
			return last
		}
	}
	return last
}

// verdict says what may do better after a failed try.
type verdict int

const (
	final     verdict = iota // nothing: the answer stands
	elsewhere                // another node; this one will answer the same again
	later                    // another node, or this one later
)

// preferred keeps the more telling of two errors of one call that may be tried
// again: that a write may have been made must not be forgotten, and an answer from
// a node says more than a node that could not be reached.
func preferred(old, next error) error {
	answered := func(err error) bool { return !errors.As(err, new(*url.Error)) }
	switch {
	case old == nil, errors.Is(next, kms.Unknown):
		return next
	case errors.Is(old, kms.Unknown), answered(old) && !answered(next):
		return old
	}
	return next
}

// try makes one request and says whether another node or a later try may do better.
func (c *Client) try(ctx context.Context, base *url.URL, method, path string, body []byte, out any, o callOptions) (verdict, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	var sent sends
	req, err := newRequest(httptrace.WithClientTrace(ctx, sent.trace()), base, method, path, body, o)
	if err != nil {
		return final, kms.Wrap(kms.Invalid, err, "the request cannot be made", "")
	}
	resp, err := c.http.Do(req)
	if err != nil && sent.before() {
		return later, brokeOff(base, method, err)
	}
	if err != nil {
		return explain(base, method, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 2*wire.MaxBody))
	if err != nil {
		return later, brokeOff(base, method, err)
	}
	if resp.StatusCode >= 300 {
		if r, ok := out.(*wire.Ready); ok && resp.StatusCode == http.StatusServiceUnavailable && json.Unmarshal(b, r) == nil && len(r.Reasons) > 0 {
			return final, nil // the one answer that is not 200 and no problem
		}
		err := problem(resp, b)
		switch kms.KindOf(err) {
		case kms.NotResident:
			return elsewhere, err
		case kms.Unavailable, kms.Unknown, kms.Stale, kms.ReadOnly:
			if sent.before() && method != http.MethodGet {
				return later, brokeOff(base, method, err)
			}
			return later, err
		}
		return final, err
	}
	if raw, ok := out.(*[]byte); ok {
		*raw = b
		return final, nil
	}
	if out == nil {
		return final, nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return final, kms.Wrap(kms.Internal, err, "the answer of "+base.Host+" is not understood", "use a client of the cluster's version")
	}
	return final, nil
}

// sends notes whether a request went out more than once: where a connection that was used
// before breaks, net/http sends a request with an Idempotency-Key again on another, and only the error of that
// try is told.
type sends struct {
	mu          sync.Mutex
	now, former bool // on the present connection, on one before
}

func (s *sends) trace() *httptrace.ClientTrace {
	return &httptrace.ClientTrace{
		GetConn: func(string) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.now, s.former = false, s.former || s.now
		},
		WroteHeaders: func() {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.now = true
		},
	}
}

// before reports whether the request may have arrived by a connection before the last one.
func (s *sends) before() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.former
}

// newRequest makes a request; path is escaped already.
func newRequest(ctx context.Context, base *url.URL, method, path string, body []byte, o callOptions) (*http.Request, error) {
	u := *base
	u.RawPath = base.EscapedPath() + path
	var err error
	if u.Path, err = url.PathUnescape(u.RawPath); err != nil {
		return nil, err
	}
	u.RawQuery = o.query.Encode()
	req, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(body))
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if o.local {
		req.Header.Set("Conclave-Consistency", "local")
	}
	if o.idempotency != "" {
		req.Header.Set("Idempotency-Key", o.idempotency)
	}
	return req, nil
}

func problem(resp *http.Response, b []byte) error {
	var p wire.Problem
	if err := json.Unmarshal(b, &p); err != nil || p.Type == "" {
		return kms.Errorf(kms.Internal, "%s answered %s without a problem document; is it a Conclave node?", resp.Request.URL.Host, resp.Status)
	}
	return p.Err()
}

const certificateFix = "use a certificate that a site's CA issued for spiffe://TRUST-DOMAIN/ROLE/NAME and that has not expired"

// explain names the cause of a failed connection and the next step.
func explain(base *url.URL, method string, err error) (verdict, error) {
	var otherHost x509.HostnameError
	var unknownCA *tls.CertificateVerificationError
	var alert tls.AlertError
	var op *net.OpError
	switch {
	case errors.As(err, &otherHost):
		return elsewhere, kms.Wrap(kms.Unauthenticated, err, fmt.Sprintf("the certificate of %s is not for that name: %v", base.Host, otherHost), "use the name that is in the certificate, or have the site's CA issue one with this DNS name or IP address as SAN")
	case errors.As(err, &unknownCA):
		return elsewhere, kms.Wrap(kms.Unauthenticated, err, fmt.Sprintf("the certificate of %s is not issued by a CA in CONCLAVE_CACERT: %v", base.Host, unknownCA.Err), "give the sites' CA certificates, or check the address")
	case errors.As(err, &alert):
		return elsewhere, kms.Wrap(kms.Unauthenticated, err, fmt.Sprintf("%s refused this client's certificate (%v)", base.Host, alert), certificateFix)
	case strings.Contains(err.Error(), "remote error: tls:"):
		return elsewhere, kms.Wrap(kms.Unauthenticated, err, base.Host+" refused this client's certificate", certificateFix)
	case errors.Is(err, context.Canceled):
		return final, brokeOff(base, method, err)
	case errors.As(err, &op) && op.Op == "dial":
		return later, kms.Wrap(kms.Unavailable, err, base.Host+" cannot be reached", "check that the node runs, or name other nodes in CONCLAVE_ADDR (comma-separated)")
	}
	return later, brokeOff(base, method, err)
}

// brokeOff is a connection that failed when the request may have arrived.
func brokeOff(base *url.URL, method string, err error) error {
	what := "the connection to " + base.Host + " broke off"
	switch {
	case errors.Is(err, context.Canceled):
		what = "cancelled"
	case errors.Is(err, context.DeadlineExceeded):
		what = base.Host + " did not answer in time"
	}
	if method == http.MethodGet {
		return kms.Wrap(kms.Unavailable, err, what, "try again, or name other nodes in CONCLAVE_ADDR (comma-separated)")
	}
	return kms.Wrap(kms.Unknown, err, what+"; the request may have been carried out", "repeat it with the same idempotency key")
}

func newIdempotencyKey() string {
	b := make([]byte, 16)
	_, _ = rand.Read(b) // never fails (crypto/rand)
	return hex.EncodeToString(b)
}

// pause waits before the next round over the addresses: 100 ms, doubled each
// round up to 2 s.
func pause(ctx context.Context, round int) error {
	d := min(100*time.Millisecond<<min(round-1, 8), 2*time.Second)
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return kms.Wrap(kms.Unavailable, ctx.Err(), "gave up waiting", "")
	}
}
