package engine

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/conclave-kms/conclave/kms/wire"
)

// TestSuspicion: what the consensus layer suspects is in the access log in the node's own
// name, counted, and an alarm.
func TestSuspicion(t *testing.T) {
	w := newWorld(t, "")
	n := w.at("fr")
	s := wire.Suspicion{Kind: "withheld", Leader: "de-1", Term: 7, Origin: "fr-1", First: w.clock.Now(), Last: w.clock.Now(), Count: 1, DelayMS: (31 * time.Second).Milliseconds(), Text: "a text"}
	reg := prometheus.NewRegistry()
	e := n.engine
	e.metrics = must(newMetrics(reg, e))
	e.cfg.Raft = func() wire.Raft { return wire.Raft{Suspicions: []wire.Suspicion{s}} }
	if err := e.Suspect(bg, s); err != nil {
		t.Fatal(err)
	}
	l := n.logged(actSuspect, "node/fr-1")
	if len(l) != 1 || l[0].Principal != "spiffe://fr.example/node/fr-1" || l[0].Context["kind"] != "withheld" || l[0].Context["leader"] != "de-1" || l[0].Context["term"] != "7" || l[0].Context["delay_ms"] != "31000" {
		t.Errorf("the access log has %+v", l)
	}
	counted := map[string]float64{}
	for _, f := range must(reg.Gather()) {
		for _, m := range f.GetMetric() {
			if f.GetName() == "conclave_leader_suspicions_total" {
				counted[m.GetLabel()[0].GetValue()] = m.GetCounter().GetValue()
			}
		}
	}
	if counted["withheld"] != 1 || counted["backdated"] != 0 || len(counted) != 2 {
		t.Errorf("counted: %v", counted)
	}
	a := w.alarms("fr", wire.AlarmSuspicion)
	if len(a) != 1 || a[0].Subject != "node/de-1" || !a[0].Since.Equal(s.First) || a[0].Text != "fr-1 reports: a text" {
		t.Errorf("alarms: %+v", a)
	}
}
