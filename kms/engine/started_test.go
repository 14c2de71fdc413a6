package engine

import (
	"math"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
)

// A node that was never up to date since its start does not say that something is
// missing or forbidden: it does not know, and a client would not ask elsewhere.
func TestNotCaughtUp(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("coalition", "fr")
	w.key("coalition", "data", kms.Encrypt)
	n := w.at("fr")
	calls := map[kms.Kind]func() error{
		kms.NotFound: func() error {
			local := caller("operator", "fr")
			local.Local = true
			_, err := n.engine.Key(bg, local, "nowhere", "data")
			return err
		},
		kms.Denied: func() error {
			_, err := n.engine.Encrypt(bg, caller("stranger", "fr"), "coalition", "data", wire.EncryptRequest{Plaintext: []byte("x")})
			return err
		},
	}
	for kind, call := range calls {
		wantKind(t, call(), kind)
		*n.fresh, n.cutOff = math.MaxInt64, true
		wantKind(t, call(), kms.Unavailable)
		if e := n.log.last(); e.Outcome != kms.Unavailable.String() {
			t.Errorf("logged %+v", e)
		}
		*n.fresh, n.cutOff = 0, false
	}
	*n.fresh = math.MaxInt64
	if r := n.engine.Ready(bg); r.Ready || len(r.Reasons) != 1 || !strings.Contains(r.Reasons[0], "caught up") {
		t.Errorf("ready: %+v", r)
	}
}

// A node that was never up to date since its start serves nothing, whatever the keyring
// allows: its disk may be from any time. It does once it has been, and goes on as the
// keyring says when it is cut off then.
func TestNothingIsServedBeforeTheFirstProof(t *testing.T) {
	w := newWorld(t, "")
	fr, service := w.at("fr"), caller("service", "fr")
	check[wire.Keyring](t)(fr.engine.CreateKeyring(bg, caller("operator", "fr"), wire.CreateKeyringRequest{
		Name: "lasting", Residency: []string{"fr"}, Policy: "standard", Survive: true, MaxStalenessMS: 5000}))
	w.key("lasting", "data", kms.Encrypt)
	q := wire.EncryptRequest{Plaintext: []byte("x")}
	r := check[wire.EncryptResponse](t)(fr.engine.Encrypt(bg, service, "lasting", "data", q))
	decrypt := func() error {
		_, err := fr.engine.Decrypt(bg, service, "lasting", "data", wire.DecryptRequest{Ciphertext: r.Ciphertext})
		return err
	}
	fr.engine.now = func() time.Time { // time passes between two looks at it
		w.clock.Advance(time.Nanosecond)
		return w.clock.Now()
	}
	*fr.fresh, fr.cutOff = math.MaxInt64, true
	_, err := fr.engine.Encrypt(bg, service, "lasting", "data", q)
	wantKind(t, err, kms.Stale)
	wantKind(t, decrypt(), kms.Stale)
	if s := fr.engine.staleness(w.cluster.State(), service); len(s) != 1 || s[0].Serves != servesNothing {
		t.Errorf("status: %+v", s)
	}
	*fr.fresh = time.Hour
	if err := decrypt(); err != nil {
		t.Errorf("cut off later: %v", err)
	}
}

// What an operator sets alarms on is there.
func TestHealthMetrics(t *testing.T) {
	w := newWorld(t, "")
	reg := prometheus.NewRegistry()
	if _, err := newMetrics(reg, w.at("fr").engine); err != nil {
		t.Fatal(err)
	}
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		got[f.GetName()] = f.GetMetric()[0].GetGauge().GetValue()
	}
	if v, ok := got["conclave_device_up"]; !ok || v != 1 {
		t.Errorf("conclave_device_up: %v, %v", v, ok)
	}
	if v, ok := got["conclave_access_log_failed"]; !ok || v != 0 {
		t.Errorf("conclave_access_log_failed: %v, %v", v, ok)
	}
	for _, name := range []string{"conclave_state_age_seconds", "conclave_clock_offset_seconds", "conclave_proposals_open",
		"conclave_keys_overdue", "conclave_receipts_pending"} {
		if _, ok := got[name]; !ok {
			t.Errorf("%s is missing", name)
		}
	}
}

// Once the access log has failed, the refusal says that the node must be restarted.
func TestRefusalAfterLogFailureSaysWhatHelps(t *testing.T) {
	w := newWorld(t, "")
	e := w.at("fr").engine
	e.logFailed.Store(true)
	w.at("fr").log.fail = kms.Errorf(kms.ReadOnly, "no space")
	_, err := e.Keyrings(bg, caller("operator", "fr"))
	wantKind(t, err, kms.ReadOnly)
	if err == nil || !strings.Contains(err.Error(), "restart") {
		t.Errorf("got %v", err)
	}
}
