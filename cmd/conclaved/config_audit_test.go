package main

import (
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/conclave-kms/conclave/kms/audit"
)

func TestSinks(t *testing.T) {
	text := strings.Replace(goodConfig, "[api]", "[audit.file]\npath = \"copies.jsonl\"\n[audit.otlp]\nendpoint = \"https://127.0.0.1:1/v1/logs\"\nca = \"ca.pem\"\n[api]", 1)
	path := writeConfigFile(t, text)
	c, err := loadConfig(path)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	ca := filepath.Join(filepath.Dir(path), "ca.pem")
	if _, err := c.Audit.open(log); err == nil || !strings.Contains(err.Error(), "audit.otlp.ca") || !strings.Contains(err.Error(), ca) {
		t.Errorf("a CA that is missing: %v", err)
	}
	if err := os.WriteFile(ca, []byte("no PEM"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Audit.open(log); err == nil || !strings.Contains(err.Error(), "no certificate") {
		t.Errorf("a CA that is none: %v", err)
	}
	c.Audit.OTLP = nil
	sinks, err := c.Audit.open(log)
	if err != nil || len(sinks) != 1 {
		t.Fatal(len(sinks), err)
	}
	sinks[0].Put(audit.Entry{Action: "encrypt"})
	if err := closeSinks(sinks); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join(filepath.Dir(path), "copies.jsonl"))
	if err != nil || !strings.Contains(string(b), `"action":"encrypt"`) {
		t.Errorf("%q, %v", b, err)
	}
	registry := prometheus.NewRegistry()
	if err := registry.Register(sinkCounters(sinks)); err != nil {
		t.Fatal(err)
	}
	families, err := registry.Gather()
	if err != nil || len(families) != 2 || families[1].GetMetric()[0].GetCounter().GetValue() != 1 {
		t.Errorf("%v, %v", families, err)
	}
}
