package engine

import (
	"context"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
)

// metrics counts requests; nil counts nothing.
type metrics struct {
	requests  *prometheus.CounterVec
	durations *prometheus.HistogramVec
	agent     *prometheus.CounterVec
	suspected *prometheus.CounterVec
}

func newMetrics(reg *prometheus.Registry, e *Engine) (*metrics, error) {
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
		suspected: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "conclave_leader_suspicions_total", Help: "Suspicions against the leader or another node's clock, by kind (withheld, backdated); GET /v1/status says which.",
		}, []string{"kind"}),
	}
	for _, kind := range []string{"withheld", "backdated"} { // so that the first one is an increase
		m.suspected.WithLabelValues(kind)
	}
	for _, c := range []prometheus.Collector{m.requests, m.durations, m.agent, m.suspected, gauges{e}} {
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

func (m *metrics) suspicion(kind string) {
	if m != nil {
		m.suspected.WithLabelValues(kind).Inc()
	}
}

func outcomeLabel(err error) string {
	if err == nil {
		return "ok"
	}
	return kms.KindOf(err).String()
}

// gauges are what a scrape asks of an engine.
type gauges struct{ e *Engine }

var (
	freshDesc    = prometheus.NewDesc("conclave_state_age_seconds", "Age of the last proof that this node is up to date.", nil, nil)
	indexDesc    = prometheus.NewDesc("conclave_applied_index", "Index of the last log entry applied here.", nil, nil)
	keyringsDesc = prometheus.NewDesc("conclave_keyrings", "Keyrings by whether this node can open them.", []string{"resident"}, nil)
	keysDesc     = prometheus.NewDesc("conclave_keys", "Keys of all keyrings.", nil, nil)
	overdueDesc  = prometheus.NewDesc("conclave_keys_overdue", "Keys whose rotation is overdue.", nil, nil)
	openDesc     = prometheus.NewDesc("conclave_proposals_open", "Proposals that are open or authorised.", nil, nil)
	pendingDesc  = prometheus.NewDesc("conclave_receipts_pending", "Receipts that this node owes.", nil, nil)
	logDesc      = prometheus.NewDesc("conclave_access_log_failed", "1 when the access log could not be written. From then on scrapes are refused like every request: alert on failing scrapes too.", nil, nil)
	cachedDesc   = prometheus.NewDesc("conclave_cache_entries", "Opened keys: in locked memory (kek, key), loaded in the device (handle).", []string{"kind"}, nil)
	deviceDesc   = prometheus.NewDesc("conclave_device_up", "1 when the hardware root answers.", nil, nil)
	skewDesc     = prometheus.NewDesc("conclave_clock_offset_seconds", "This node's clock minus the cluster's, which is a few seconds old.", nil, nil)
	silenceDesc  = prometheus.NewDesc("conclave_node_silence_seconds", "Cluster time since a node last signed its time; absent for a node that never did.", []string{"node"}, nil)
	standingDesc = prometheus.NewDesc("conclave_alarms", "Alarms that are on, by kind; GET /v1/alarms names them.", []string{"kind"}, nil)
	windowDesc   = prometheus.NewDesc("conclave_audit_uncosigned_seconds", "How long leaves of a log have waited for the cosignatures of a majority of the sites, as this node sees it.", []string{"log"}, nil)
	alarmsDesc   = prometheus.NewDesc("conclave_audit_alarms", "What is wrong with the logs' checkpoints; GET /v1/ready names it.", nil, nil)
	lookupsDesc  = prometheus.NewDesc("conclave_cache_lookups_total", "Lookups of opened keys.", []string{"outcome"}, nil)
)

// Describe implements prometheus.Collector.
func (g gauges) Describe(c chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{freshDesc, indexDesc, keyringsDesc, keysDesc, overdueDesc, openDesc, pendingDesc, logDesc, cachedDesc, lookupsDesc,
		deviceDesc, skewDesc, silenceDesc, standingDesc, windowDesc, alarmsDesc} {
		c <- d
	}
}

// Collect implements prometheus.Collector.
func (g gauges) Collect(c chan<- prometheus.Metric) {
	put := func(d *prometheus.Desc, t prometheus.ValueType, v float64, labels ...string) {
		c <- prometheus.MustNewConstMetric(d, t, v, labels...)
	}
	st, counts, cache := g.e.cluster.State(), g.e.counts(g.e.cluster.State()), g.e.cfg.Cache.Stats()
	put(freshDesc, prometheus.GaugeValue, g.e.cluster.Fresh().Seconds())
	put(indexDesc, prometheus.CounterValue, float64(st.Index()))
	put(keyringsDesc, prometheus.GaugeValue, float64(counts.Resident), "yes")
	put(keyringsDesc, prometheus.GaugeValue, float64(counts.Keyrings-counts.Resident), "no")
	put(keysDesc, prometheus.GaugeValue, float64(counts.Keys))
	put(overdueDesc, prometheus.GaugeValue, float64(counts.Overdue))
	put(openDesc, prometheus.GaugeValue, float64(len(st.ProposalsOpen())))
	put(pendingDesc, prometheus.GaugeValue, float64(len(st.Pending(g.e.node))))
	put(logDesc, prometheus.GaugeValue, oneIf(g.e.logFailed.Load()))
	g.alarms(put)
	put(cachedDesc, prometheus.GaugeValue, float64(cache.KEKs), "kek")
	put(cachedDesc, prometheus.GaugeValue, float64(cache.Keys), "key")
	put(cachedDesc, prometheus.GaugeValue, float64(cache.Handles), "handle")
	put(lookupsDesc, prometheus.CounterValue, float64(cache.Hits), "hit")
	put(lookupsDesc, prometheus.CounterValue, float64(cache.Misses), "miss")
	if g.e.cfg.Checkpoints != nil {
		for _, log := range logsOf(st) {
			put(windowDesc, prometheus.GaugeValue, g.e.lags.of(log, g.e.now()).Seconds(), log)
		}
		put(alarmsDesc, prometheus.GaugeValue, float64(len(g.e.auditAlarms(st))))
	}
	g.health(st, put)
}

// alarms counts those that are on; a kind without any is 0.
func (g gauges) alarms(put func(*prometheus.Desc, prometheus.ValueType, float64, ...string)) {
	on := map[string]int{}
	for _, kind := range alarmKinds {
		on[kind] = 0
	}
	for _, x := range g.e.Standing() {
		on[x.Kind]++
	}
	for kind, n := range on {
		put(standingDesc, prometheus.GaugeValue, float64(n), kind)
	}
}

// deviceWait is how long a scrape waits for the device.
const deviceWait = 3 * time.Second

// health are the gauges of what this node rests on: its device, its clock and
// the other nodes.
func (g gauges) health(st *state.State, put func(*prometheus.Desc, prometheus.ValueType, float64, ...string)) {
	ctx, cancel := context.WithTimeout(context.Background(), deviceWait)
	defer cancel()
	put(deviceDesc, prometheus.GaugeValue, oneIf(g.e.deviceAnswers(ctx) == nil))
	if st.Clock() > 0 {
		put(skewDesc, prometheus.GaugeValue, float64(g.e.now().UnixMilli()-st.Clock())/1000)
	}
	for _, n := range st.Nodes() {
		if s, ok := st.NodeStatus(n.ID); ok {
			put(silenceDesc, prometheus.GaugeValue, max(0, float64(st.Clock()-s.Time)/1000), n.ID)
		}
	}
}

func oneIf(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
