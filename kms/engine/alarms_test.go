package engine

import (
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

func (w *world) alarms(site string, kind string) (l []wire.Alarm) {
	w.t.Helper()
	v := check[wire.Alarms](w.t)(w.at(site).engine.Alarms(bg, caller("auditor", site)))
	for _, x := range v.Alarms {
		if x.Kind == kind {
			l = append(l, x)
		}
		if x.ID == "" || x.Text == "" || x.Subject == "" {
			w.t.Errorf("%+v says nothing", x)
		}
	}
	return l
}

// logged returns the entries of an action about a subject.
func (n *testNode) logged(act Action, subject string) (l []audit.Entry) {
	n.log.mu.Lock()
	defer n.log.mu.Unlock()
	for _, e := range n.log.entries {
		if e.Action == string(act) && e.Resource == subject {
			l = append(l, e)
		}
	}
	return l
}

// TestAlarmOverdue: an overdue rotation is an alarm at every node, under one name, with an
// entry in the access log when it begins and when it ends, and keeps no node from
// being ready.
func TestAlarmOverdue(t *testing.T) {
	w := newWorld(t, "")
	as := w.agents()
	w.keyring("r", "fr", "de")
	const day = 24 * time.Hour
	check[wire.Key](t)(w.at("fr").engine.CreateKey(bg, caller("operator", "fr"), "r", wire.CreateKeyRequest{
		Name: "data", Purpose: "encrypt", RotationPeriodMS: (30 * day).Milliseconds()}))
	pass := func(d, step time.Duration) {
		for ; d > 0; d -= step {
			w.clock.Advance(step)
			w.tick()
			w.settle(as)
		}
	}
	pass(time.Minute, 20*time.Second)
	for _, kind := range []string{wire.AlarmOverdue, wire.AlarmNode, wire.AlarmRotateKEK, wire.AlarmCertificate} {
		if l := w.alarms("jp", kind); len(l) > 0 {
			t.Errorf("in order, and yet: %+v", l)
		}
	}
	pass(31*day, day)
	fr, jp := w.alarms("fr", wire.AlarmOverdue), w.alarms("jp", wire.AlarmOverdue)
	if len(fr) != 1 || len(jp) != 1 || fr[0].ID != jp[0].ID || fr[0].Subject != "key/r/data" || !strings.Contains(fr[0].Text, "proposal ") {
		t.Fatalf("%+v, %+v", fr, jp)
	}
	began := w.at("jp").logged(actAlarmBegins, "key/r/data")
	if len(began) != 1 || began[0].Context["kind"] != wire.AlarmOverdue || began[0].Context["id"] != fr[0].ID || began[0].Principal != "spiffe://jp.example/node/jp-1" {
		t.Errorf("%+v", began)
	}
	if r := w.at("fr").engine.Ready(bg); !r.Ready {
		t.Errorf("not ready: %v", r.Reasons)
	}
	// Who may not read a keyring learns nothing of it.
	forbid := newWorld(t, DefaultAccess()+`forbid (principal in Role::"auditor", action == Action::"key:read", resource in Keyring::"r");`)
	forbid.keyring("r", "fr")
	if v := check[wire.Alarms](t)(forbid.at("fr").engine.Alarms(bg, caller("auditor", "fr"))); v.Hidden != 1 {
		t.Errorf("%+v", v)
	}
	w.vote(view(t, w), approval.Approve, "fr-a", "de-a")
	pass(2*time.Minute, 20*time.Second)
	if l := w.alarms("fr", wire.AlarmOverdue); len(l) > 0 {
		t.Errorf("rotated, and yet: %+v", l)
	}
	if b, e := w.at("jp").logged(actAlarmBegins, "key/r/data"), w.at("jp").logged(actAlarmEnds, "key/r/data"); len(b) != 1 || len(e) != 1 || e[0].Context["id"] != fr[0].ID {
		t.Errorf("began %+v, ended %+v", b, e)
	}
}

// view is the one open proposal.
func view(t *testing.T, w *world) wire.Proposal {
	t.Helper()
	open := w.cluster.State().ProposalsOpen()
	if len(open) != 1 {
		t.Fatalf("%d open proposals", len(open))
	}
	return check[wire.Proposal](t)(proposalView(w.cluster.State(), open[0]))
}

// TestAlarmNode: a node that is silent is an alarm at the others, one that is cut off at
// itself; what cannot be logged is tried again.
func TestAlarmNode(t *testing.T) {
	w := newWorld(t, "")
	reg := prometheus.NewRegistry()
	fr, jp := w.at("fr"), w.at("jp")
	cfg := fr.engine.cfg
	cfg.Metrics = reg
	fr.engine = must(New(cfg))
	as := w.agents()
	for range 5 { // without jp
		w.clock.Advance(20 * time.Second)
		for _, site := range []string{"fr", "de"} {
			check[any](t)(nil, tick(w, site))
		}
		as["fr-1"].work(bg)
	}
	l := w.alarms("fr", wire.AlarmNode)
	if len(l) != 1 || l[0].Subject != "node/jp-1" || len(fr.logged(actAlarmBegins, "node/jp-1")) != 1 {
		t.Fatalf("%+v", l)
	}
	if got := gathered(t, reg, "conclave_alarms"); got[wire.AlarmNode] != 1 || got[wire.AlarmOverdue] != 0 || len(got) != len(alarmKinds) {
		t.Errorf("%v", got)
	}
	fr.log.fail = errLogFailed // its end is not logged, so it is tried again
	check[any](t)(nil, tick(w, "jp"))
	w.clock.Advance(alarmEvery)
	as["fr-1"].work(bg)
	fr.log.fail = nil
	w.clock.Advance(alarmEvery)
	as["fr-1"].work(bg)
	if l := fr.logged(actAlarmEnds, "node/jp-1"); len(l) != 1 {
		t.Errorf("its end was logged %d times", len(l))
	}
	// Cut off.
	*jp.fresh = time.Hour
	w.clock.Advance(time.Minute)
	as["jp-1"].work(bg)
	if l := jp.engine.Standing(); len(l) == 0 || l[0].Subject != "node/jp-1" || !strings.Contains(l[0].Text, "cut off") {
		t.Errorf("%+v", l)
	}
}

// gathered returns the values of a gauge by its label.
func gathered(t *testing.T, reg *prometheus.Registry, name string) map[string]float64 {
	t.Helper()
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	values := map[string]float64{}
	for _, f := range families {
		if f.GetName() != name {
			continue
		}
		for _, m := range f.GetMetric() {
			values[m.GetLabel()[0].GetValue()] = m.GetGauge().GetValue()
		}
	}
	return values
}

func tick(w *world, site string) error {
	_, err := w.at(site).engine.submit(bg, attempt{}, state.Tick{})
	return err
}
