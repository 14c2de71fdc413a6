package sink

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"time"

	"github.com/conclave-kms/conclave/kms/audit"
)

// otlp posts entries as log records of the OpenTelemetry protocol, OTLP/HTTP with JSON
// (https://opentelemetry.io/docs/specs/otlp/#otlphttp).
type otlp struct {
	endpoint string
	client   *http.Client
}

// Severity numbers of the OpenTelemetry logs data model.
const (
	severityInfo = 9
	severityWarn = 13
)

// ParseEndpoint checks the URL of a collector, which ends in /v1/logs by default.
func ParseEndpoint(endpoint string) error {
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme != "https" && u.Scheme != "http" || u.Host == "" || u.User != nil || u.Path == "" || u.Path == "/" {
		return fmt.Errorf("%q is not a URL such as https://collector.example:4318/v1/logs", endpoint)
	}
	return nil
}

// OTLP begins a sink that posts to a collector; config is for https endpoints.
func OTLP(endpoint string, config *tls.Config, log *slog.Logger) (*Queue, error) {
	if err := ParseEndpoint(endpoint); err != nil {
		return nil, err
	}
	transport := &http.Transport{TLSClientConfig: config, MaxIdleConns: 1, IdleConnTimeout: time.Minute, ForceAttemptHTTP2: true}
	client := &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }}
	return start("otlp", &otlp{endpoint: endpoint, client: client}, log, queueLength, firstRetry), nil
}

type (
	otlpValue struct {
		String *string `json:"stringValue,omitempty"`
		Int    string  `json:"intValue,omitempty"` // 64-bit integers are strings in JSON
	}
	otlpAttribute struct {
		Key   string    `json:"key"`
		Value otlpValue `json:"value"`
	}
	otlpRecord struct {
		Time       string          `json:"timeUnixNano"`
		Severity   int             `json:"severityNumber"`
		Body       otlpValue       `json:"body"`
		Attributes []otlpAttribute `json:"attributes"`
	}
	otlpScope struct {
		Scope struct {
			Name string `json:"name"`
		} `json:"scope"`
		Records []otlpRecord `json:"logRecords"`
	}
	otlpResource struct {
		Resource struct {
			Attributes []otlpAttribute `json:"attributes"`
		} `json:"resource"`
		Scopes []otlpScope `json:"scopeLogs"`
	}
	otlpLogs struct {
		Resources []otlpResource `json:"resourceLogs"`
	}
)

func text(key, s string) otlpAttribute { return otlpAttribute{key, otlpValue{String: &s}} }
func number(key string, n int64) otlpAttribute {
	return otlpAttribute{key, otlpValue{Int: strconv.FormatInt(n, 10)}}
}

// record maps an entry; its attributes are named as FORMAT.md of kms/audit names the fields.
func record(e audit.Entry) otlpRecord {
	body := e.Action + " " + e.Resource + ": " + e.Outcome
	r := otlpRecord{Time: strconv.FormatInt(e.Time*int64(time.Millisecond), 10), Severity: severityInfo, Body: otlpValue{String: &body}}
	if e.Outcome != "ok" {
		r.Severity = severityWarn
	}
	r.Attributes = []otlpAttribute{
		text("conclave.node", e.Node), text("conclave.principal", e.Principal), text("conclave.action", e.Action), text("conclave.resource", e.Resource),
		number("conclave.version", int64(e.Version)), text("conclave.request", e.Request), text("conclave.outcome", e.Outcome), number("conclave.count", int64(e.Count)),
	}
	var names []string
	for name := range e.Context {
		names = append(names, name)
	}
	slices.Sort(names)
	for _, name := range names {
		r.Attributes = append(r.Attributes, text("conclave.context."+name, e.Context[name]))
	}
	return r
}

func (w *otlp) write(ctx context.Context, entries []audit.Entry) (int, error) {
	var scope otlpScope
	scope.Scope.Name = "conclave/access"
	for _, e := range entries {
		scope.Records = append(scope.Records, record(e))
	}
	resource := otlpResource{Scopes: []otlpScope{scope}}
	resource.Resource.Attributes = []otlpAttribute{text("service.name", "conclaved"), text("service.instance.id", entries[0].Node)}
	body, err := json.Marshal(otlpLogs{Resources: []otlpResource{resource}})
	if err != nil {
		return 0, errors.Join(errRefused, err)
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, w.endpoint, bytes.NewReader(body))
	if err != nil {
		return 0, errors.Join(errRefused, err)
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := w.client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	said, err := io.ReadAll(io.LimitReader(resp.Body, 1<<20))
	if err != nil {
		return 0, err
	}
	switch resp.StatusCode {
	case http.StatusOK, http.StatusAccepted, http.StatusNoContent:
		return min(rejected(said), len(entries)), nil
	case http.StatusTooManyRequests, http.StatusBadGateway, http.StatusServiceUnavailable, http.StatusGatewayTimeout:
		return 0, fmt.Errorf("the collector answered %s", resp.Status)
	}
	return 0, errors.Join(errRefused, fmt.Errorf("the collector answered %s", resp.Status))
}

// rejected returns how many records the collector says that it has not taken.
func rejected(said []byte) int {
	var answer struct {
		Partial struct {
			Rejected json.Number `json:"rejectedLogRecords"`
		} `json:"partialSuccess"`
	}
	if json.Unmarshal(said, &answer) != nil {
		return 0
	}
	n, err := strconv.Atoi(string(answer.Partial.Rejected))
	if err != nil || n < 0 {
		return 0
	}
	return n
}

func (w *otlp) close() error {
	w.client.CloseIdleConnections()
	return nil
}
