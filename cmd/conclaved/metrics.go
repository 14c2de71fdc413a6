package main

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/kms/state"
)

// nodeGauges are what a scrape asks of the consensus layer, the disk and the
// certificates.
type nodeGauges struct {
	cluster interface {
		Status() cluster.Status
		State() *state.State
	}
	dir     string // its file system is the one that fills up
	expires time.Time
}

var (
	leaderDesc    = prometheus.NewDesc("conclave_raft_leader", "1 when this node leads.", nil, nil)
	hasLeaderDesc = prometheus.NewDesc("conclave_raft_has_leader", "1 when this node knows a leader.", nil, nil)
	termDesc      = prometheus.NewDesc("conclave_raft_term", "Raft's term: it grows with every election.", nil, nil)
	committedDesc = prometheus.NewDesc("conclave_raft_committed_index", "Index of the last log entry known to be committed.", nil, nil)
	readOnlyDesc  = prometheus.NewDesc("conclave_read_only", "1 when the disk is so full that this node as leader takes no changes.", nil, nil)
	unknownDesc   = prometheus.NewDesc("conclave_proposals_unknown_total", "Commands submitted here that ended without a known outcome.", nil, nil)
	noEffectDesc  = prometheus.NewDesc("conclave_commands_refused_total", "Applied log entries that were recorded without effect.", nil, nil)
	diskDesc      = prometheus.NewDesc("conclave_data_free_bytes", "Free bytes of the file system that holds the data directory.", nil, nil)
	expiryDesc    = prometheus.NewDesc("conclave_certificate_expiry_timestamp_seconds",
		"When a certificate expires, Unix time: this node's own (kind node) and the earliest of each site's CAs (kind ca).", []string{"kind", "name"}, nil)
)

func newNodeGauges(n *cluster.Node, dir string, cert tls.Certificate) (nodeGauges, error) {
	leaf, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		return nodeGauges{}, fmt.Errorf("tls: the node's certificate: %w", err)
	}
	return nodeGauges{cluster: n, dir: dir, expires: leaf.NotAfter}, nil
}

// Describe implements prometheus.Collector.
func (g nodeGauges) Describe(c chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{leaderDesc, hasLeaderDesc, termDesc, committedDesc, readOnlyDesc, unknownDesc, noEffectDesc, diskDesc, expiryDesc} {
		c <- d
	}
}

// Collect implements prometheus.Collector.
func (g nodeGauges) Collect(c chan<- prometheus.Metric) {
	put := func(d *prometheus.Desc, t prometheus.ValueType, v float64, labels ...string) {
		c <- prometheus.MustNewConstMetric(d, t, v, labels...)
	}
	flag := map[bool]float64{true: 1}
	s := g.cluster.Status()
	put(leaderDesc, prometheus.GaugeValue, flag[s.State == "leader"])
	put(hasLeaderDesc, prometheus.GaugeValue, flag[s.Leader != ""])
	put(termDesc, prometheus.CounterValue, float64(s.Term))
	put(committedDesc, prometheus.CounterValue, float64(s.Committed))
	put(readOnlyDesc, prometheus.GaugeValue, flag[s.ReadOnly])
	put(unknownDesc, prometheus.CounterValue, float64(s.Unknown))
	put(noEffectDesc, prometheus.CounterValue, float64(s.NoEffect))
	if free, _, err := cluster.FreeSpace(g.dir); err == nil {
		put(diskDesc, prometheus.GaugeValue, float64(free))
	}
	put(expiryDesc, prometheus.GaugeValue, float64(g.expires.Unix()), "node", s.Node)
	for _, site := range g.cluster.State().Sites() {
		if at := earliestExpiry(site.CAs); !at.IsZero() {
			put(expiryDesc, prometheus.GaugeValue, float64(at.Unix()), "ca", site.ID)
		}
	}
}

// earliestExpiry returns when the first of some certificates expires, the zero
// time for none.
func earliestExpiry(ders [][]byte) time.Time {
	var first time.Time
	for _, der := range ders {
		cert, err := x509.ParseCertificate(der)
		if err == nil && (first.IsZero() || cert.NotAfter.Before(first)) {
			first = cert.NotAfter
		}
	}
	return first
}
