package notify

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/conclave-kms/conclave/kms/secret"
)

// Webhook is where notices are posted.
type Webhook struct {
	Name  string
	URL   string
	Keys  []*secret.Bytes // from ParseKeys; the outbox destroys them
	TLS   *tls.Config     // for https
	Kinds []string        // that it wants; none: all
}

func (w Webhook) wants(kind string) bool { return len(w.Kinds) == 0 || slices.Contains(w.Kinds, kind) }

// ParseURL checks the URL of a webhook: https, or http to this machine.
func ParseURL(s string) error {
	u, err := url.Parse(s)
	if err == nil && u.Host != "" && u.User == nil && u.Fragment == "" {
		ip, notIP := netip.ParseAddr(u.Hostname())
		if u.Scheme == "https" || u.Scheme == "http" && (u.Hostname() == "localhost" || notIP == nil && ip.IsLoopback()) {
			return nil
		}
	}
	return errors.New("it is not a URL such as https://desk.example/conclave; http is for this machine alone")
}

// errRefused is wrapped where posting again is of no use.
var errRefused = errors.New("the webhook refused the notice for good")

// message is what is posted (Standard Webhooks, "Payload structure").
type message struct {
	Type      string    `json:"type"`
	Timestamp time.Time `json:"timestamp"`
	Data      Notice    `json:"data"`
}

// poster posts to one webhook.
type poster struct {
	Webhook
	client *http.Client
}

func newPoster(w Webhook) *poster {
	transport := &http.Transport{TLSClientConfig: w.TLS, MaxIdleConns: 1, IdleConnTimeout: time.Minute, ForceAttemptHTTP2: true}
	return &poster{w, &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}}
}

// post posts a notice once.
func (p *poster) post(ctx context.Context, n Notice, now time.Time) error {
	body, err := json.Marshal(message{"conclave." + n.Kind, n.Time, n})
	if err != nil {
		return errors.Join(errRefused, err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.URL, bytes.NewReader(body))
	if err != nil {
		return errors.Join(errRefused, err)
	}
	id := n.messageID()
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Webhook-Id", id)
	req.Header.Set("Webhook-Timestamp", strconv.FormatInt(now.Unix(), 10))
	req.Header.Set("Webhook-Signature", signature(p.Keys, id, now, body))
	resp, err := p.client.Do(req)
	if err != nil {
		return withoutURL(err)
	}
	defer resp.Body.Close()
	_, _ = io.CopyN(io.Discard, resp.Body, 64<<10) // so that the connection can be used again
	switch code := resp.StatusCode; {
	case code >= 200 && code < 300:
		return nil
	case code == http.StatusBadRequest, code == http.StatusGone, code == http.StatusRequestEntityTooLarge, code == http.StatusUnsupportedMediaType, code == http.StatusUnprocessableEntity:
		return fmt.Errorf("%w: it answered %s", errRefused, resp.Status)
	}
	return fmt.Errorf("the webhook answered %s", resp.Status)
}

// withoutURL takes the URL out of an error of net/http, since it may hold what is not for
// the log.
func withoutURL(err error) error {
	var u *url.Error
	if errors.As(err, &u) {
		return u.Err
	}
	return err
}
