package main

import (
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

type fixedCluster struct {
	st     *state.State
	status cluster.Status
}

func (f fixedCluster) Status() cluster.Status { return f.status }
func (f fixedCluster) State() *state.State    { return f.st }

// What an operator sets alarms on is there: leader, disk and certificates.
func TestNodeGauges(t *testing.T) {
	st := statetest.New(t, statetest.Options{}).State()
	expires := time.Unix(1800000000, 0)
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(nodeGauges{dir: t.TempDir(), expires: expires,
		cluster: fixedCluster{st: st, status: cluster.Status{Node: "fr-1", State: "leader", Leader: "fr-1", ReadOnly: true}}})
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]float64{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			name := f.GetName()
			for _, l := range m.GetLabel() {
				name += " " + l.GetValue()
			}
			got[name] = m.GetGauge().GetValue()
		}
	}
	for name, want := range map[string]float64{
		"conclave_raft_leader": 1, "conclave_raft_has_leader": 1, "conclave_read_only": 1,
		"conclave_certificate_expiry_timestamp_seconds node fr-1": float64(expires.Unix()),
	} {
		if got[name] != want {
			t.Errorf("%s: %v, want %v", name, got[name], want)
		}
	}
	if got["conclave_data_free_bytes"] == 0 {
		t.Error("conclave_data_free_bytes is missing")
	}
}
