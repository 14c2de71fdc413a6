package native

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/fakedevice"
)

// TestEveryKindIsAProblem answers each kind of error through the handler.
func TestEveryKindIsAProblem(t *testing.T) {
	s := New(Config{})
	for k := kms.Internal; !strings.HasPrefix(k.String(), "kind-"); k++ {
		w := httptest.NewRecorder()
		s.refuse(w, kms.Wrap(k, errors.New("a cause"), "what happened", "what to do"), begin(w, httptest.NewRequest("GET", "/", nil)))
		a := answer{t: t, what: k.String(), status: w.Code, header: w.Header(), body: w.Body.Bytes()}
		p := a.problem(k, wire.HTTPStatus(k))
		if strings.Contains(w.Body.String(), "a cause") || (k != kms.Internal && (p.Detail != "what happened" || p.Fix != "what to do")) {
			t.Errorf("%v: %s", k, w.Body)
		}
		if retry := w.Header().Get("Retry-After"); (retry != "") != (w.Code == 503) {
			t.Errorf("%v: status %d, Retry-After %q", k, w.Code, retry)
		}
	}
	w := httptest.NewRecorder()
	s.refuse(w, fmt.Errorf("a secret: %w", errors.New("detail")), "r")
	if w.Code != 500 || strings.Contains(w.Body.String(), "secret") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
}

// TestRefusals makes each kind of request that the API itself refuses.
func TestRefusals(t *testing.T) {
	w := newWorld(t, options{})
	w.found()
	c, admin := w.client("service"), w.client("operator")
	enc := "/v1/keyrings/ring/keys/enc/encrypt"
	for _, x := range []struct {
		name, method, path string
		body               any
		kind               kms.Kind
		status             int
		says               string
	}{
		{"unknown field", "POST", enc, `{"plaintext":"aGk=","plain":"x"}`, kms.Invalid, 400, `unknown field "plain"`},
		{"unknown field in a batch", "POST", enc, `{"items":[{"plaintext":"aGk=","plain":"x"}]}`, kms.Invalid, 400, `unknown field "items.0.plain"`},
		{"item and items", "POST", enc, `{"plaintext":"aGk=","items":[]}`, kms.Invalid, 400, `unknown field "items"`},
		{"items and item", "POST", enc, `{"items":[],"plaintext":"aGk="}`, kms.Invalid, 400, `unknown field "plaintext"`},
		{"truncated", "POST", enc, `{"plaintext":"aGk="`, kms.Invalid, 400, "ends too early"},
		{"trailing value", "POST", enc, `{"plaintext":"aGk="} {}`, kms.Invalid, 400, "goes on"},
		{"trailing brace", "POST", enc, `{"plaintext":"aGk="}}`, kms.Invalid, 400, "goes on"},
		{"trailing text", "POST", enc, `{"plaintext":"aGk="} x`, kms.Invalid, 400, "goes on"},
		{"empty", "POST", enc, ``, kms.Invalid, 400, "not a JSON object"},
		{"null", "POST", enc, `null`, kms.Invalid, 400, "not a JSON object"},
		{"array", "POST", enc, `[]`, kms.Invalid, 400, "not a JSON object"},
		{"not JSON", "POST", enc, `plaintext=x`, kms.Invalid, 400, "not a JSON object"},
		{"a bad character", "POST", enc, `{plaintext}`, kms.Invalid, 400, "at byte 1"},
		{"not base64", "POST", enc, `{"plaintext":"!"}`, kms.Invalid, 400, "not base64"},
		{"a number for bytes", "POST", enc, `{"plaintext":4711}`, kms.Invalid, 400, "plaintext must not be a number"},
		{"plaintext missing", "POST", enc, `{}`, kms.Invalid, 400, "plaintext is missing"},
		{"plaintext null", "POST", enc, `{"plaintext":null}`, kms.Invalid, 400, "plaintext is missing"},
		{"plaintext missing in a batch", "POST", enc, `{"items":[{"plaintext":""},{}]}`, kms.Invalid, 400, "item 1: plaintext is missing"},
		{"items null", "POST", enc, `{"items":null}`, kms.Invalid, 400, "items is empty"},
		{"plaintext too large", "POST", enc, wire.EncryptRequest{Plaintext: make([]byte, wire.MaxPlaintext+1)}, kms.TooLarge, 413, "65537"},
		{"no such key", "POST", "/v1/keyrings/ring/keys/none/encrypt", `{"plaintext":""}`, kms.NotFound, 404, "none"},
		{"no key's name", "POST", "/v1/keyrings/ring/keys/N%20O/encrypt", `{"plaintext":""}`, kms.Invalid, 400, ""},
		{"a slash in a name", "POST", "/v1/keyrings/ring/keys/a%2Fb/encrypt", `{"plaintext":""}`, kms.Invalid, 400, ""},
		{"wrong purpose", "POST", "/v1/keyrings/ring/keys/mac/encrypt", `{"plaintext":""}`, kms.Invalid, 400, ""},
		{"version not a number", "GET", "/v1/keyrings/ring/keys/sig/public-key?version=x", nil, kms.Invalid, 400, "version"},
		{"version too large", "GET", "/v1/keyrings/ring/keys/sig/public-key?version=4294967296", nil, kms.Invalid, 400, "version"},
		{"garbage does not open", "POST", "/v1/keyrings/ring/keys/enc/decrypt", `{"ciphertext":"AAAA"}`, kms.OpenFailed, 422, "cannot be opened"},
		{"no rights", "POST", "/v1/keyrings", wire.CreateKeyringRequest{Name: "x", Residency: []string{"fr"}, Policy: "standard"}, kms.Denied, 403, ""},
		{"unknown route", "GET", "/v1/nothing", nil, kms.NotFound, 404, "GET /v1/nothing"},
		{"root", "GET", "/", nil, kms.NotFound, 404, ""},
		{"trailing slash", "GET", "/v1/health/", nil, kms.NotFound, 404, ""},
		{"double slash", "GET", "//v1/health", nil, kms.NotFound, 404, ""},
		{"dots", "GET", "/v1/../v1/health", nil, kms.NotFound, 404, ""},
		{"wrong method", "POST", "/v1/health", `{}`, kms.Invalid, 405, "does not take POST"},
		{"delete", "DELETE", "/v1/keyrings/ring", nil, kms.Invalid, 405, "use GET"},
		{"get on a data operation", "GET", enc, nil, kms.Invalid, 405, "use POST"},
		{"put on a collection", "PUT", "/v1/keyrings", `{}`, kms.Invalid, 405, "GET, POST"},
	} {
		t.Run(x.name, func(t *testing.T) {
			p := w.in(t).call(c, x.method, x.path, x.body).problem(x.kind, x.status)
			if !strings.Contains(p.Detail+" "+p.Fix, x.says) {
				t.Errorf("%q, %q do not say %q", p.Detail, p.Fix, x.says)
			}
			for _, leak := range []string{"wire.", "json:", "github.com", "4711"} {
				if strings.Contains(p.Detail+p.Fix, leak) {
					t.Errorf("%q shows %q", p.Detail, leak)
				}
			}
		})
	}
	if a := w.call(c, "PATCH", "/v1/keyrings", `{}`); a.header.Get("Allow") != "GET, POST" {
		t.Errorf("Allow: %q", a.header.Get("Allow"))
	}
	for _, typ := range []string{"", "text/plain", "application/x-www-form-urlencoded", "application/jsonp", ";"} {
		w.call(c, "POST", enc, `{"plaintext":""}`, "Content-Type", typ).problem(kms.Invalid, 415)
	}
	for _, typ := range []string{"application/json", "application/json; charset=utf-8", "Application/JSON"} {
		w.call(c, "POST", enc, `{"plaintext":""}`, "Content-Type", typ).ok(nil)
	}
	w.call(admin, "GET", "/v1/health", "a body that nobody reads").ok(nil)
}

// in is the world for a subtest.
func (w *world) in(t testing.TB) *view { return &view{w, t} }

// view is a world whose calls fail a subtest.
type view struct {
	w *world
	t testing.TB
}

func (v view) call(c *http.Client, method, path string, body any) answer {
	a := v.w.call(c, method, path, body)
	a.t = v.t
	return a
}

func TestHugeBody(t *testing.T) {
	w := newWorld(t, options{})
	w.found()
	c := w.client("service")
	body := `{"plaintext":"` + strings.Repeat("A", wire.MaxBody) + `"}`
	w.call(c, "POST", "/v1/keyrings/ring/keys/enc/encrypt", body).problem(kms.TooLarge, 413)

	// Without a declared length it is cut off at the limit.
	req := must(http.NewRequestWithContext(t.Context(), "POST", w.base+"/v1/keyrings/ring/keys/enc/encrypt", struct{ *strings.Reader }{strings.NewReader(body)}))
	req.ContentLength = -1
	req.Header.Set("Content-Type", "application/json")
	resp, err := c.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != 413 || resp.Header.Get("Content-Type") != wire.ProblemType {
		t.Errorf("%s %v", resp.Status, resp.Header)
	}
}

func TestDeviceAndLogFailures(t *testing.T) {
	w := newWorld(t, options{})
	w.found()
	c, admin := w.client("service"), w.client("operator")
	w.device.Fail(func(string) error { return fakedevice.ErrUnavailable })
	p := w.call(admin, "POST", "/v1/keyrings/ring/keys", wire.CreateKeyRequest{Name: "x", Purpose: "mac"}).problem(kms.Unavailable, 503)
	if strings.Contains(p.Detail, "fakedevice") {
		t.Errorf("%q shows what is internal", p.Detail)
	}
	w.device.Fail(nil)
	w.set(func(w *world) { w.fail = kms.Errorf(kms.Unavailable, "there is no leader") })
	w.call(admin, "POST", "/v1/keyrings/ring/keys", wire.CreateKeyRequest{Name: "x", Purpose: "mac"}).problem(kms.Unavailable, 503)
	w.set(func(w *world) { w.fail = nil })
	w.log.mu.Lock()
	w.log.err = kms.Errorf(kms.ReadOnly, "disk full")
	w.log.mu.Unlock()
	w.call(c, "POST", "/v1/keyrings/ring/keys/mac/mac", wire.MACRequest{Message: []byte("m")}).problem(kms.ReadOnly, 503)
}

func TestMetricsNeedARight(t *testing.T) {
	w := newWorld(t, options{metrics: metrics("up 1\n")})
	w.call(w.client("service"), "GET", "/v1/metrics", nil).problem(kms.Denied, 403)
	if a := w.call(w.client("auditor"), "GET", "/v1/metrics", nil).ok(nil); string(a.body) != "up 1\n" {
		t.Errorf("%q", a.body)
	}
	other := newWorld(t, options{})
	other.call(other.client("auditor"), "GET", "/v1/metrics", nil).problem(kms.NotFound, 404)
}

func TestProblemIsStableJSON(t *testing.T) {
	w := httptest.NewRecorder()
	New(Config{}).refuse(w, &kms.Error{Kind: kms.NotFound, Msg: "no key", Fix: "make one"}, "r1")
	want := `{"type":"urn:conclave:problem:not-found","title":"not found","status":404,"detail":"no key","fix":"make one","instance":"r1"}`
	if got := w.Body.String(); got != want || !json.Valid(w.Body.Bytes()) {
		t.Errorf("%s", got)
	}
}
