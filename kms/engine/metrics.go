package engine

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/conclave-kms/conclave/kms"
)

// metrics counts requests; nil counts nothing.
type metrics struct {
	requests  *prometheus.CounterVec
	durations *prometheus.HistogramVec
	agent     *prometheus.CounterVec
}

func newMetrics(reg *prometheus.Registry) (*metrics, error) {
	if reg == nil {
		return nil, nil
	}
	m := &metrics{
		requests: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "conclave_requests_total", Help: "Requests by action and outcome (ok or the kind of error).",
		}, []string{"action", "outcome"}),
		durations: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "conclave_request_duration_seconds", Help: "Time from the start of a request to its durable entry in the access log.",
			Buckets: []float64{.0001, .0003, .001, .003, .01, .03, .1, .3, 1, 3, 10},
		}, []string{"action"}),
		agent: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "conclave_agent_tasks_total", Help: "Tasks of the background agent by kind and outcome.",
		}, []string{"task", "outcome"}),
	}
	for _, c := range []prometheus.Collector{m.requests, m.durations, m.agent} {
		if err := reg.Register(c); err != nil {
			return nil, kms.Wrap(kms.Invalid, err, "engine: metrics cannot be registered", "give every engine a registry of its own")
		}
	}
	return m, nil
}

func (m *metrics) count(act Action, err error, took time.Duration) {
	if m == nil {
		return
	}
	m.requests.WithLabelValues(string(act), outcomeLabel(err)).Inc()
	m.durations.WithLabelValues(string(act)).Observe(took.Seconds())
}

func (m *metrics) task(name string, err error) {
	if m != nil {
		m.agent.WithLabelValues(name, outcomeLabel(err)).Inc()
	}
}

func outcomeLabel(err error) string {
	if err == nil {
		return "ok"
	}
	return kms.KindOf(err).String()
}
