package main

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/conclave-kms/conclave/kms/anomaly"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/notify"
	"github.com/conclave-kms/conclave/kms/sink"
)

// rememberEvery is how often what the detector remembers is written to the disk. What came
// after is read from the access log at a start.
const rememberEvery = 5 * time.Minute

// watcher looks for what is unusual in a node's access log.
type watcher struct {
	node, file string
	log        *slog.Logger
	now        func() time.Time
	detector   *anomaly.Detector
	found      *prometheus.CounterVec
	written    time.Time

	note    func(ctx context.Context, subject string, what map[string]string) error
	cluster string
	put     func(...notify.Notice) error
}

// watchAccess begins to look, if it is configured, and adds a sink that feeds it.
func (n *node) watchAccess() error {
	if n.cfg.Anomaly == nil {
		return nil
	}
	policy, err := n.cfg.Anomaly.policy(n.trustDomain())
	if err != nil {
		return err
	}
	w := &watcher{node: n.cfg.Node, file: filepath.Join(n.cfg.DataDir, "anomaly.json"), log: n.log, now: time.Now, detector: anomaly.New(policy), cluster: n.cluster.State().Cluster(),
		found: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "conclave_anomalies_total", Help: "What was unusual in this node's access log, by rule."}, []string{"rule"})}
	for _, rule := range anomaly.Rules() {
		w.found.WithLabelValues(rule)
	}
	if err := n.registry.Register(w.found); err != nil {
		return err
	}
	if n.outbox != nil {
		w.put = n.outbox.Put
	}
	w.recall(filepath.Join(n.cfg.DataDir, "access"))
	w.written = w.now()
	n.watcher = w
	feed := sink.To("anomaly", w.take, n.log)
	n.sinks = append(n.sinks, feed)
	n.closeLater(func() error { return errors.Join(feed.Close(), w.remember()) })
	return nil
}

// trustDomain is that of this node's certificate's site.
func (n *node) trustDomain() string {
	if c := n.certificate; c != nil && len(c.URIs) > 0 {
		return c.URIs[0].Host
	}
	return ""
}

// recall goes on from what was remembered, and from what the access log has after that.
// Where nothing can be read, the detector learns anew.
func (w *watcher) recall(access string) {
	b, err := os.ReadFile(w.file)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var last int64
	if err == nil {
		last, err = w.detector.Unmarshal(b)
	}
	if err != nil {
		w.log.Warn("what was usual is not known any more; learning anew", "file", w.file, "error", err)
		return
	}
	if _, err := audit.ReadSince(access, time.UnixMilli(last+1), func(e audit.Entry) { w.observe(e) }); err != nil { // findings were told before
		w.log.Warn("what was usual just before the start is not known", "error", err)
	}
}

// remember writes what the detector remembers.
func (w *watcher) remember() error {
	b, err := w.detector.Marshal()
	if err != nil {
		return err
	}
	return replaceFile(w.file, b, 0o600)
}

func (w *watcher) observe(e audit.Entry) []anomaly.Finding {
	return w.detector.Observe(anomaly.Entry{Time: e.Time, Node: e.Node, Principal: e.Principal, Action: e.Action, Resource: e.Resource, Outcome: e.Outcome, Count: e.Count})
}

// take observes entries of the access log.
func (w *watcher) take(ctx context.Context, entries []audit.Entry) {
	for _, e := range entries {
		for _, f := range w.observe(e) {
			w.tell(ctx, f)
		}
	}
	if now := w.now(); now.Sub(w.written) >= rememberEvery {
		w.written = now
		if err := w.remember(); err != nil {
			w.log.WarnContext(ctx, "what is usual cannot be written to the disk", "error", err)
		}
	}
}

// tell counts a finding, notes it in the access log and puts it into the outbox.
func (w *watcher) tell(ctx context.Context, f anomaly.Finding) {
	w.found.WithLabelValues(f.Rule).Inc()
	subject := f.Principal
	if f.Key != "" {
		subject = f.Key
	}
	w.log.WarnContext(ctx, "unusual", "rule", f.Rule, "what", f.Text)
	if err := w.note(ctx, subject, map[string]string{"id": f.ID, "rule": f.Rule, "principal": f.Principal, "text": f.Text}); err != nil {
		w.log.WarnContext(ctx, "an anomaly cannot be noted in the access log", "error", err)
	}
	if w.put == nil {
		return
	}
	if err := w.put(notify.Notice{
		ID: "anomaly:" + f.ID, Kind: notify.KindAnomaly, Cluster: w.cluster, Node: w.node, Time: time.UnixMilli(f.Time).UTC(), Subject: subject, Text: f.Text,
	}); err != nil {
		w.log.WarnContext(ctx, "a notice of an anomaly cannot be kept", "error", err)
	}
}
