package main

import (
	"context"
	"log/slog"
	"path/filepath"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/conclave-kms/conclave/kms/notify"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

const (
	notifyEvery = 2 * time.Second  // between looks for what is to be told
	notifyFresh = 30 * time.Second // age of the state beyond which proposals may be settled long since
)

// openOutbox begins to send notices, if webhooks are configured.
func (n *node) openOutbox(context.Context) error {
	if len(n.cfg.Notify) == 0 {
		return nil
	}
	hooks, err := n.cfg.Notify.webhooks()
	if err != nil {
		return err
	}
	if n.outbox, err = notify.Open(filepath.Join(n.cfg.DataDir, "notices.db"), hooks, n.log); err != nil {
		return err
	}
	n.closeLater(n.outbox.Close)
	return n.registry.Register(noticeCounters{n.outbox})
}

// notifier puts into the outbox what is to be told.
type notifier struct {
	node   string
	log    *slog.Logger
	outbox interface {
		Put(l ...notify.Notice) error
	}
	alarms  interface{ Standing() []wire.Alarm }
	cluster interface {
		State() *state.State
		Fresh() time.Duration
	}

	failing bool
}

// run looks regularly until ctx ends.
func (n *notifier) run(ctx context.Context) {
	t := time.NewTicker(notifyEvery)
	defer t.Stop()
	for {
		n.look(ctx)
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
	}
}

// look puts what is new. A node that starts comes by states of the past, in which
// proposals are open that are settled since, so it waits until it has caught up; its own
// alarms it tells even when it is cut off.
func (n *notifier) look(ctx context.Context) {
	st := n.cluster.State()
	l := notify.Of(st, n.node, n.alarms.Standing(), n.cluster.Fresh() <= notifyFresh)
	err := n.outbox.Put(l...)
	if err != nil && !n.failing {
		n.log.ErrorContext(ctx, "notices cannot be kept; trying on", "error", err)
	}
	n.failing = err != nil
}

var (
	noticesDesc = prometheus.NewDesc("conclave_notices_total", "Notices that a webhook has taken (sent), or that were given up or for which there was no room (dropped).", []string{"webhook", "outcome"}, nil)
	waitingDesc = prometheus.NewDesc("conclave_notices_waiting", "Notices that a webhook has yet to take.", []string{"webhook"}, nil)
)

// noticeCounters are what a scrape asks of the outbox.
type noticeCounters struct{ outbox *notify.Outbox }

// Describe implements prometheus.Collector.
func (c noticeCounters) Describe(d chan<- *prometheus.Desc) { d <- noticesDesc; d <- waitingDesc }

// Collect implements prometheus.Collector.
func (c noticeCounters) Collect(m chan<- prometheus.Metric) {
	for _, s := range c.outbox.Stats() {
		m <- prometheus.MustNewConstMetric(noticesDesc, prometheus.CounterValue, float64(s.Sent), s.Webhook, "sent")
		m <- prometheus.MustNewConstMetric(noticesDesc, prometheus.CounterValue, float64(s.Dropped), s.Webhook, "dropped")
		m <- prometheus.MustNewConstMetric(waitingDesc, prometheus.GaugeValue, float64(s.Waiting), s.Webhook)
	}
}
