package main

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/conclave-kms/conclave/kms/sink"
)

// AuditConfig says where the logs are exported to and where copies of the access log go
// besides: none of it is needed.
type AuditConfig struct {
	Export string `toml:"export"` // directory, for any static file server

	File   *FileSink   `toml:"file"`
	Syslog *SyslogSink `toml:"syslog"`
	OTLP   *OTLPSink   `toml:"otlp"`
}

// FileSink is a file with one line of JSON for each entry.
type FileSink struct {
	Path string `toml:"path"`
}

// SyslogSink is a syslog server.
type SyslogSink struct {
	Address string `toml:"address"` // unix:///dev/log, udp://, tcp:// or tls://HOST:PORT
	CA      string `toml:"ca"`      // PEM file for tls addresses; default: the system's
}

// OTLPSink is an OpenTelemetry collector.
type OTLPSink struct {
	Endpoint string `toml:"endpoint"` // https://HOST:4318/v1/logs
	CA       string `toml:"ca"`       // PEM file for https endpoints; default: the system's
}

// check returns the first field that is wrong and why.
func (c AuditConfig) check() (field, why string) {
	if c.File != nil && c.File.Path == "" {
		return "audit.file.path", "missing: the file to append to"
	}
	if s := c.Syslog; s != nil {
		scheme, _, err := sink.ParseSyslog(s.Address)
		if err != nil {
			return "audit.syslog.address", err.Error()
		}
		if s.CA != "" && scheme != "tls" {
			return "audit.syslog.ca", "only a tls:// address has use for it"
		}
	}
	if s := c.OTLP; s != nil {
		if err := sink.ParseEndpoint(s.Endpoint); err != nil {
			return "audit.otlp.endpoint", err.Error()
		}
		if s.CA != "" && !strings.HasPrefix(s.Endpoint, "https:") {
			return "audit.otlp.ca", "only an https:// endpoint has use for it"
		}
	}
	return "", ""
}

// paths are those of files, which are relative to the configuration.
func (c *AuditConfig) paths() (p []*string) {
	p = append(p, &c.Export)
	if c.File != nil {
		p = append(p, &c.File.Path)
	}
	if c.Syslog != nil {
		p = append(p, &c.Syslog.CA)
	}
	if c.OTLP != nil {
		p = append(p, &c.OTLP.CA)
	}
	return p
}

// open begins the sinks.
func (c AuditConfig) open(log *slog.Logger) (sinks []*sink.Queue, err error) {
	defer func() {
		if err != nil {
			err = errors.Join(err, closeSinks(sinks))
		}
	}()
	add := func(field string, q *sink.Queue, err error) error {
		if err != nil {
			return fmt.Errorf("%s: %w", field, err)
		}
		sinks = append(sinks, q)
		return nil
	}
	if c.File != nil {
		q, err := sink.File(c.File.Path, log)
		if err := add("audit.file.path", q, err); err != nil {
			return sinks, err
		}
	}
	if c.Syslog != nil {
		config, err := sinkTLS("audit.syslog.ca", c.Syslog.CA)
		if err != nil {
			return sinks, err
		}
		q, err := sink.Syslog(c.Syslog.Address, config, log)
		if err := add("audit.syslog.address", q, err); err != nil {
			return sinks, err
		}
	}
	if c.OTLP != nil {
		config, err := sinkTLS("audit.otlp.ca", c.OTLP.CA)
		if err != nil {
			return sinks, err
		}
		q, err := sink.OTLP(c.OTLP.Endpoint, config, log)
		if err := add("audit.otlp.endpoint", q, err); err != nil {
			return sinks, err
		}
	}
	return sinks, nil
}

func closeSinks(sinks []*sink.Queue) error {
	var errs []error
	for _, q := range sinks {
		errs = append(errs, q.Close())
	}
	return errors.Join(errs...)
}

func sinkTLS(field, ca string) (*tls.Config, error) {
	config := &tls.Config{MinVersion: tls.VersionTLS13}
	if ca == "" {
		return config, nil
	}
	b, err := os.ReadFile(ca)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	config.RootCAs = x509.NewCertPool()
	if !config.RootCAs.AppendCertsFromPEM(b) {
		return nil, fmt.Errorf("%s: %s holds no certificate in PEM", field, ca)
	}
	return config, nil
}

var (
	copiesDesc  = prometheus.NewDesc("conclave_audit_copies_total", "Access log entries that a sink has taken.", []string{"sink"}, nil)
	droppedDesc = prometheus.NewDesc("conclave_audit_copies_dropped_total", "Access log entries that a sink did not take in time; they are in the log.", []string{"sink"}, nil)
)

// sinkCounters are what a scrape asks of the sinks.
type sinkCounters []*sink.Queue

// Describe implements prometheus.Collector.
func (s sinkCounters) Describe(c chan<- *prometheus.Desc) { c <- copiesDesc; c <- droppedDesc }

// Collect implements prometheus.Collector.
func (s sinkCounters) Collect(c chan<- prometheus.Metric) {
	for _, q := range s {
		c <- prometheus.MustNewConstMetric(copiesDesc, prometheus.CounterValue, float64(q.Sent()), q.Name())
		c <- prometheus.MustNewConstMetric(droppedDesc, prometheus.CounterValue, float64(q.Dropped()), q.Name())
	}
}
