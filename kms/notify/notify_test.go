package notify

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
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
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/wire"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var quiet = slog.New(slog.DiscardHandler)

// vectorKey and what is signed with it are the test vector of the reference libraries of
// Standard Webhooks.
const vectorKey = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"

func keys(t *testing.T, text string) []*secret.Bytes {
	t.Helper()
	k, err := ParseKeys([]byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func TestSignatureVector(t *testing.T) {
	const want = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
	body, at := []byte(`{"test": 2432232314}`), time.Unix(1614265330, 0)
	one := keys(t, vectorKey+"\n")
	defer destroy(one)
	if got := signature(one, "msg_p5jXN8AQM9LWM0D4loKWxJek", at, body); got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	two := keys(t, "\n"+vectorKey+"\r\nwhsec_"+strings.Repeat("AAAA", 8)+"\n")
	defer destroy(two)
	if got := strings.Fields(signature(two, "msg_p5jXN8AQM9LWM0D4loKWxJek", at, body)); len(got) != 2 || got[0] != want || got[1] == want {
		t.Errorf("with two keys: %s", got)
	}
}

func TestParseKeysRefuses(t *testing.T) {
	for name, text := range map[string]string{
		"nothing": "\n", "no prefix": strings.TrimPrefix(vectorKey, "whsec_"), "no base64": "whsec_" + strings.Repeat("?", 40),
		"short": "whsec_" + strings.Repeat("AAAA", 7), "long": "whsec_" + strings.Repeat("AAAA", 22),
		"many": strings.Repeat(vectorKey+"\n", maxKeys+1), "a bad second one": vectorKey + "\nwhsec_x",
	} {
		k, err := ParseKeys([]byte(text))
		if !errors.Is(err, kms.Invalid) || k != nil {
			t.Errorf("%s: %v", name, err)
		} else if strings.Contains(err.Error(), "MfKQ") {
			t.Errorf("%s: the error shows a key", name)
		}
	}
}

func TestParseURL(t *testing.T) {
	for _, s := range []string{"https://desk.example/x?y=z", "http://127.0.0.1:80/x", "http://[::1]:80", "http://localhost:1/"} {
		if err := ParseURL(s); err != nil {
			t.Errorf("%s: %v", s, err)
		}
	}
	for _, s := range []string{"", "desk.example", "http://desk.example/", "http://10.0.0.1/", "ftp://desk.example", "https://u:p@desk.example/", "https:///x", "https://desk.example/#f", "http://127.0.0.1.evil.example/"} {
		if err := ParseURL(s); err == nil || strings.Contains(err.Error(), "u:p") {
			t.Errorf("%s: %v", s, err)
		}
	}
}

// desk is a receiver that answers as it is told.
type desk struct {
	*httptest.Server
	answers chan int // one is taken for each request

	mu          sync.Mutex
	got         []string // IDs of what it took
	ids         []string // webhook-id of all
	fail        []string
	asked, took chan string
}

func newDesk(t *testing.T) *desk {
	d := &desk{answers: make(chan int, 1000), asked: make(chan string, 1000), took: make(chan string, 1000)}
	d.Server = httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		var m message
		if err == nil {
			err = json.Unmarshal(body, &m)
		}
		k, kerr := ParseKeys([]byte(vectorKey))
		var at int64
		_, terr := fmt.Sscan(r.Header.Get("webhook-timestamp"), &at)
		if err = errors.Join(err, kerr, terr); err == nil {
			if got := r.Header.Get("webhook-signature"); got != signature(k, r.Header.Get("webhook-id"), time.Unix(at, 0), body) {
				err = fmt.Errorf("signature %q", got)
			}
			destroy(k)
		}
		d.asked <- m.Data.ID
		var code int
		select {
		case code = <-d.answers:
		case <-r.Context().Done():
			return
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		if err != nil {
			d.fail = append(d.fail, err.Error())
		}
		d.ids = append(d.ids, r.Header.Get("webhook-id"))
		if code < 300 {
			d.got = append(d.got, m.Data.ID)
			d.took <- m.Data.ID
		}
		w.WriteHeader(code)
	}))
	t.Cleanup(func() {
		d.Close()
		if len(d.fail) > 0 {
			t.Errorf("bad requests: %s", d.fail)
		}
	})
	return d
}

func (d *desk) will(codes ...int) {
	for _, c := range codes {
		d.answers <- c
	}
}

// clock is a time that tests set.
type clock struct {
	mu  sync.Mutex
	now time.Time
}

func (c *clock) Now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

func (c *clock) add(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = c.now.Add(d)
}

func notice(i int) Notice {
	return Notice{ID: fmt.Sprintf("n-%d", i), Kind: KindProposal, Cluster: "c", Node: "fr-1", Time: time.UnixMilli(1767225600000).UTC(), Subject: "key/a/b", Text: "a text"}
}

func box(t *testing.T, file string, c *clock, hooks ...Webhook) *Outbox {
	t.Helper()
	o, err := open(file, hooks, quiet, c.Now, time.Millisecond)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Close() })
	return o
}

func (d *desk) wait(t *testing.T, want ...string) {
	t.Helper()
	for _, id := range want {
		select {
		case got := <-d.took:
			if got != id {
				t.Fatalf("%s came, want %s", got, id)
			}
		case <-time.After(30 * time.Second):
			t.Fatalf("%s did not come", id)
		}
	}
}

// waitAsked waits for an attempt at a notice; those before it are done with then.
func (d *desk) waitAsked(id string) {
	for got := range d.asked {
		if got == id {
			return
		}
	}
}

// TestOutbox: what a webhook refuses is posted again, in order and under the same id, over
// a restart, and each once.
func TestOutbox(t *testing.T) {
	d := newDesk(t)
	file := filepath.Join(t.TempDir(), "notices.db")
	c := &clock{now: time.Now()}
	hook := func() Webhook { return Webhook{Name: "desk", URL: d.URL, Keys: keys(t, vectorKey)} }
	o := box(t, file, c, hook())
	if err := o.Put(notice(1), notice(2), notice(1)); err != nil {
		t.Fatal(err)
	}
	d.will(500, 503, 429, 401, 200, 204)
	d.wait(t, "n-1", "n-2")
	if err := o.Put(notice(2), notice(1)); err != nil {
		t.Fatal(err)
	}
	if err := o.Put(notice(3)); err != nil {
		t.Fatal(err)
	}
	d.waitAsked("n-3") // it has no answer before the end; the one before is done with
	if err := errors.Join(o.Close(), o.Close()); err != nil {
		t.Fatal(err)
	}
	o = box(t, file, c, hook())
	if s := o.Stats(); len(s) != 1 || s[0].Webhook != "desk" {
		t.Errorf("%+v", s)
	}
	if err := o.Put(notice(3), notice(1), notice(4)); err != nil {
		t.Fatal(err)
	}
	d.will(200, 200)
	d.wait(t, "n-3", "n-4")
	d.mu.Lock()
	first := slices.Compact(slices.Clone(d.ids[:5]))
	d.mu.Unlock()
	if len(first) != 1 || first[0] != notice(1).messageID() || strings.Contains(first[0], ".") {
		t.Errorf("attempts at one notice: %v", first)
	}
	// What is dropped: for good, and after a week.
	d.will(422, 200)
	if err := o.Put(notice(5), notice(6)); err != nil {
		t.Fatal(err)
	}
	d.wait(t, "n-6")
	if err := o.Put(notice(7)); err != nil {
		t.Fatal(err)
	}
	c.add(keepTrying)
	if err := o.Put(notice(8)); err != nil {
		t.Fatal(err)
	}
	d.will(500, 200)
	d.wait(t, "n-8")
	// What still stands after a month is told again.
	c.add(knownFor)
	d.will(200)
	if err := o.Put(notice(1)); err != nil {
		t.Fatal(err)
	}
	d.wait(t, "n-1")
	if err := o.Put(notice(9)); err != nil {
		t.Fatal(err)
	}
	d.waitAsked("n-9")
	if s := o.Stats()[0]; s.Sent != 5 || s.Dropped != 2 || s.Waiting != 1 {
		t.Errorf("%+v", s)
	}
}

// TestOutboxOfSeveral: every webhook gets what it wants, one that hangs holds none up, one
// that is new is told what stands, and what one that is gone had waiting is forgotten.
func TestOutboxOfSeveral(t *testing.T) {
	a, b := newDesk(t), newDesk(t)
	file := filepath.Join(t.TempDir(), "notices.db")
	c := &clock{now: time.Now()}
	hook := func(name string, d *desk, kinds ...string) Webhook {
		return Webhook{Name: name, URL: d.URL, Keys: keys(t, vectorKey), Kinds: kinds}
	}
	alarm := notice(2)
	alarm.Kind = wire.AlarmOverdue
	o := box(t, file, c, hook("a", a, wire.AlarmOverdue), hook("b", b))
	b.will(200, 200)
	if err := o.Put(notice(1), alarm); err != nil { // a hangs
		t.Fatal(err)
	}
	b.wait(t, "n-1", "n-2")
	if s := o.Stats(); s[0].Waiting != 1 {
		t.Errorf("%+v", s)
	}
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	o = box(t, file, c, hook("c", b))
	if s := o.Stats(); len(s) != 1 || s[0].Waiting != 0 {
		t.Errorf("%+v", s)
	}
	b.will(200, 200)
	if err := o.Put(notice(1), alarm); err != nil {
		t.Fatal(err)
	}
	b.wait(t, "n-1", "n-2")
	if err := o.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := open(filepath.Join(t.TempDir(), "none", "x"), nil, quiet, c.Now, 1); !errors.Is(err, kms.Unavailable) {
		t.Errorf("%v", err)
	}
}

// TestOutboxIsBounded puts more than may wait.
func TestOutboxIsBounded(t *testing.T) {
	c := &clock{now: time.Now()}
	d := newDesk(t)
	o := box(t, filepath.Join(t.TempDir(), "notices.db"), c, Webhook{Name: "desk", URL: d.URL, Keys: keys(t, vectorKey)})
	var l []Notice
	for i := range maxWaiting + 5 {
		l = append(l, notice(i))
	}
	if err := o.Put(l...); err != nil {
		t.Fatal(err)
	}
	if s := o.Stats()[0]; s.Dropped != 5 || s.Waiting != maxWaiting {
		t.Errorf("%+v", s)
	}
}

// An outbox whose file is damaged is refused by name, and a new one begins where it was.
func TestOutboxDamaged(t *testing.T) {
	path := filepath.Join(t.TempDir(), "outbox.db")
	if err := os.WriteFile(path, []byte(strings.Repeat("no outbox", 5000)), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path, nil, quiet); !errors.Is(err, kms.Unavailable) || !strings.Contains(err.Error(), path) {
		t.Fatalf("got %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	o, err := Open(path, nil, quiet)
	if err != nil {
		t.Fatal(err)
	}
	if err := o.Close(); err != nil {
		t.Error(err)
	}
}
