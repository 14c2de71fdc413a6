// Package client is the Go client of Conclave's native API: mutual TLS 1.3 with
// hybrid key exchange, failover between nodes, and retries that are safe because
// every write carries an idempotency key.
package client

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
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
}

// Client speaks to a cluster. It is safe for concurrent use.
type Client struct {
	bases    []*url.URL
	http     *http.Client
	attempts int
	timeout  time.Duration
}

// New checks the configuration; it does not connect.
func New(cfg Config) (*Client, error) {
	if len(cfg.Addresses) == 0 {
		return nil, kms.Errorf(kms.Invalid, "no address of a node is given; set CONCLAVE_ADDR to a node's https URL")
	}
	c := &Client{attempts: cfg.Attempts, timeout: cfg.Timeout}
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
			DialContext:         (&net.Dialer{Timeout: 5 * time.Second}).DialContext,
			TLSHandshakeTimeout: 10 * time.Second,
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
	return &Client{bases: []*url.URL{u}, http: c.http, attempts: 3, timeout: c.timeout}, nil
}

type callOptions struct {
	query       url.Values
	idempotency string
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
	if method != http.MethodGet && o.idempotency == "" {
		o.idempotency = newIdempotencyKey()
	}
	var last error
	for attempt := range c.attempts {
		if attempt > 0 && attempt%len(c.bases) == 0 {
			if err := pause(ctx, attempt/len(c.bases)); err != nil {
				return errors.Join(last, err)
			}
		}
		base := c.bases[attempt%len(c.bases)]
		again, err := c.try(ctx, base, method, path, body, out, o)
		if err == nil {
			return nil
		}
		last = preferred(last, err)
		if !again || ctx.Err() != nil {
			return last
		}
	}
	return last
}

// preferred keeps the more telling of two errors of one call: an answer from a
// node says more than a node that could not be reached.
func preferred(old, next error) error {
	var unreachable *url.Error
	if old != nil && errors.As(next, &unreachable) {
		return old
	}
	return next
}

// try makes one request and says whether another node or a later try may do better.
func (c *Client) try(ctx context.Context, base *url.URL, method, path string, body []byte, out any, o callOptions) (again bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	u := *base
	u.Path += path
	u.RawQuery = o.query.Encode()
	req, err := http.NewRequestWithContext(ctx, method, u.String(), bytes.NewReader(body))
	if err != nil {
		return false, kms.Wrap(kms.Invalid, err, "the request cannot be made", "")
	}
	req.Header.Set("Accept", "application/json")
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	if o.idempotency != "" {
		req.Header.Set("Idempotency-Key", o.idempotency)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return true, explain(base, err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(io.LimitReader(resp.Body, 2*wire.MaxBody))
	if err != nil {
		return true, kms.Wrap(kms.Unknown, err, "the answer of "+base.Host+" broke off", "repeat the call with the same idempotency key")
	}
	if resp.StatusCode >= 300 {
		err := problem(resp, b)
		switch kms.KindOf(err) {
		case kms.Unavailable, kms.Unknown, kms.Stale, kms.NotResident, kms.ReadOnly:
			return true, err
		}
		return false, err
	}
	if raw, ok := out.(*[]byte); ok {
		*raw = b
		return false, nil
	}
	if out == nil {
		return false, nil
	}
	if err := json.Unmarshal(b, out); err != nil {
		return false, kms.Wrap(kms.Internal, err, "the answer of "+base.Host+" is not understood", "use a client of the cluster's version")
	}
	return false, nil
}

func problem(resp *http.Response, b []byte) error {
	var p wire.Problem
	if err := json.Unmarshal(b, &p); err != nil || p.Type == "" {
		return kms.Errorf(kms.Internal, "%s answered %s without a problem document; is it a Conclave node?", resp.Request.URL.Host, resp.Status)
	}
	return p.Err()
}

// explain names the cause of a failed connection and the next step.
func explain(base *url.URL, err error) error {
	var unknownCA *tls.CertificateVerificationError
	var alert tls.AlertError
	switch {
	case errors.As(err, &unknownCA):
		return kms.Wrap(kms.Unauthenticated, err, fmt.Sprintf("the certificate of %s is not issued by a CA in CONCLAVE_CACERT: %v", base.Host, unknownCA.Err), "give the sites' CA certificates, or check the address")
	case errors.As(err, &alert):
		return kms.Wrap(kms.Unauthenticated, err, fmt.Sprintf("%s refused this client's certificate (%v)", base.Host, alert), "use a certificate that a site's CA issued for spiffe://TRUST-DOMAIN/ROLE/NAME and that has not expired")
	case strings.Contains(err.Error(), "remote error: tls:"):
		return kms.Wrap(kms.Unauthenticated, err, base.Host+" refused this client's certificate", "use a certificate that a site's CA issued for spiffe://TRUST-DOMAIN/ROLE/NAME and that has not expired")
	case errors.Is(err, context.Canceled):
		return kms.Wrap(kms.Unavailable, err, "cancelled", "")
	}
	return kms.Wrap(kms.Unavailable, err, base.Host+" cannot be reached", "check that the node runs, or name other nodes in CONCLAVE_ADDR (comma-separated)")
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
