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
	"strings"
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

// until returns the next notice that is the one.
func (r *receiver) until(t *testing.T, what string, is func(notified) bool) notified {
	t.Helper()
	patience := time.After(2 * time.Minute)
	for {
		select {
		case n := <-r.took:
			if is(n) {
				return n
			}
		case <-patience:
			t.Fatalf("no notice of %s came", what)
		}
	}
}

// next returns the next notice of a kind about a subject.
func (r *receiver) next(t *testing.T, kind, subject string) notified {
	t.Helper()
	return r.until(t, kind+" "+subject, func(n notified) bool { return n.body.Data.Kind == kind && n.body.Data.Subject == subject })
}

// TestNotices: a webhook that fails some times is told of a proposal, once, of somebody who
// is denied often, and of an overdue rotation, which is an alarm.
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
	if _, err := fr.Configure(map[string]any{"notify.desk": map[string]any{"url": r.URL + "/conclave", "key": key}, "anomaly.denials": 3}); err != nil {
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
	r.until(t, "the third proposal", func(n notified) bool {
		if n.id == first.id { // the second may come twice, under one id
			t.Errorf("told again: %+v", n)
		}
		return n.body.Data.Proposal == third.ID
	})
	for range 3 { // an auditor may not encrypt
		_, err := s.client("fr", "auditor").Key("coalition", "told").Encrypt(ctx, wire.EncryptRequest{Plaintext: wire.Secret("x")})
		refused(t, "an auditor's encryption", err, kms.Denied)
	}
	r.next(t, "anomaly", "spiffe://fr.example/auditor/demo")
	_, err = s.client("fr", "operator").CreateKey(ctx, "coalition", wire.CreateKeyRequest{Name: "due", Purpose: string(kms.Encrypt), RotationPeriodMS: 1})
	if err != nil {
		t.Fatal(err)
	}
	r.next(t, wire.AlarmOverdue, "key/coalition/due")
	if v, err := s.client("fr", "auditor").Alarms(ctx); err != nil || len(v.Alarms) == 0 || v.Alarms[0].Kind != wire.AlarmOverdue || v.Alarms[0].Subject != "key/coalition/due" {
		t.Errorf("%+v, %v", v, err)
	}
	res, err := c.CLI(ctx, c.Env("fr"), "alarms")
	if err != nil || res.Code != 1 || !strings.Contains(res.Stdout, "key/coalition/due") || !strings.Contains(res.Stderr, "alarms: ") {
		t.Errorf("conclave alarms: %d, %q, %q, %v", res.Code, res.Stdout, res.Stderr, err)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.bad > 0 {
		t.Errorf("%d requests did not verify", r.bad)
	}
}
