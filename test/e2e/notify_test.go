package e2e

import (
	"crypto/hmac"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// webhookSecret is the key of the webhook in the test, as bytes.
const webhookSecret = "a secret of at least 24 bytes"

// notified is a request that the receiver has taken.
type notified struct {
	id   string
	body struct {
		Type string `json:"type"`
		Data struct {
			Kind     string `json:"kind"`
			Node     string `json:"node"`
			Subject  string `json:"subject"`
			Proposal string `json:"proposal"`
			Text     string `json:"text"`
		} `json:"data"`
	}
}

// receiver is a webhook as somebody outside would write it, that fails some times.
type receiver struct {
	*httptest.Server
	took chan notified

	mu    sync.Mutex
	fails int
	tried map[string]int // by id
	bad   int            // requests whose signature does not verify
}

func newReceiver(t *testing.T, fails int) *receiver {
	r := &receiver{took: make(chan notified, 1000), fails: fails, tried: map[string]int{}}
	r.Server = httptest.NewServer(http.HandlerFunc(r.serve))
	t.Cleanup(r.Close)
	return r
}

func (r *receiver) serve(w http.ResponseWriter, q *http.Request) {
	body, err := io.ReadAll(q.Body)
	if err != nil {
		return
	}
	id := q.Header.Get("Webhook-Id")
	m := hmac.New(sha256.New, []byte(webhookSecret))
	m.Write([]byte(id + "." + q.Header.Get("Webhook-Timestamp") + "." + string(body)))
	n := notified{id: id}
	valid := q.Header.Get("Webhook-Signature") == "v1,"+base64.StdEncoding.EncodeToString(m.Sum(nil)) && json.Unmarshal(body, &n.body) == nil
	r.mu.Lock()
	defer r.mu.Unlock()
	r.tried[id]++
	switch {
	case !valid:
		r.bad++
		w.WriteHeader(http.StatusUnauthorized)
	case r.fails > 0:
		r.fails--
		w.WriteHeader(http.StatusServiceUnavailable)
	default:
		w.WriteHeader(http.StatusNoContent)
		r.took <- n
	}
}

// next returns the next notice of a kind about a subject.
func (r *receiver) next(t *testing.T, kind, subject string) notified {
	t.Helper()
	patience := time.After(2 * time.Minute)
	for {
		select {
		case n := <-r.took:
			if n.body.Data.Kind == kind && n.body.Data.Subject == subject {
				return n
			}
		case <-patience:
			t.Fatalf("no notice of %s %s came", kind, subject)
		}
	}
}

// TestNotices: a webhook that fails some times is told of a proposal, once, and of a node
// that is down; what is on stands in the alarms, the metrics and the access log.
func TestNotices(t *testing.T) {
	t.Parallel()
	bin := binaries(t)
	ctx := t.Context()
	c, err := harness.Start(ctx, bin, filepath.Join(suite.dir, unique("notify")), false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.Logs(15))
		}
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	s := site{t, c}
	s.key("coalition", "told", kms.Encrypt, "")
	s.key("coalition", "other", kms.Encrypt, "")
	r := newReceiver(t, 3)
	fr := c.Nodes["fr"]
	key := filepath.Join(filepath.Dir(fr.Config), "desk.key")
	if err := os.WriteFile(key, []byte("whsec_"+base64.StdEncoding.EncodeToString([]byte(webhookSecret))+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := fr.Configure(map[string]any{"notify.desk": map[string]any{"url": r.URL + "/conclave", "key": key}}); err != nil {
		t.Fatal(err)
	}
	restart := func() {
		t.Helper()
		if err := fr.Restart(ctx); err != nil {
			t.Fatal(err)
		}
		s.settled()
	}
	restart()
	p := s.propose(kms.ActionRotate, "coalition", "told")
	first := r.next(t, "proposal", "key/coalition/told")
	r.mu.Lock()
	tried := r.tried[first.id]
	r.mu.Unlock()
	if d := first.body.Data; d.Proposal != p.ID || d.Node != "fr-1" || first.body.Type != "conclave.proposal" || tried < 2 {
		t.Errorf("%+v after %d attempts", first, tried)
	}
	q := s.propose(kms.ActionSuspend, "coalition", "told")
	second := r.next(t, "proposal", "key/coalition/told") // the first is done with then, also on the disk
	if second.body.Data.Proposal != q.ID {
		t.Errorf("%+v", second)
	}
	restart()
	third := s.propose(kms.ActionRotate, "coalition", "other")
	for n := range r.took {
		if n.body.Data.Proposal == third.ID {
			break
		}
		if n.id == first.id { // the second may come twice, under one id
			t.Fatalf("told again: %+v", n)
		}
	}
	if err := c.Nodes["jp"].Kill(ctx); err != nil {
		t.Fatal(err)
	}
	r.next(t, wire.AlarmNode, "node/jp-1")
	if v, err := s.client("fr", "auditor").Alarms(ctx); err != nil || len(v.Alarms) != 1 || v.Alarms[0].Subject != "node/jp-1" {
		t.Errorf("%+v, %v", v, err)
	}
	if err := c.Nodes["jp"].Start(ctx); err != nil {
		t.Fatal(err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.bad > 0 {
		t.Errorf("%d requests did not verify", r.bad)
	}
}
