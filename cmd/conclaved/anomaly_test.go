package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/conclave-kms/conclave/kms/anomaly"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/notify"
)

func TestAnomalyPolicy(t *testing.T) {
	text := "[anomaly]\nlearn = \"24h\"\ndenials = 3\n[anomaly.hours.office]\nkeyrings = [\"coalition\"]\ndays = [\"mon\", \"fri\"]\nfrom = \"07:30\"\nto = \"24:00\"\nzone = \"UTC\"\n[api]"
	c, err := loadConfig(writeConfigFile(t, strings.Replace(goodConfig, "[api]", text, 1)))
	if err != nil {
		t.Fatal(err)
	}
	p, err := c.Anomaly.policy("fr.example")
	if err != nil {
		t.Fatal(err)
	}
	d := anomaly.DefaultPolicy()
	if p.TrustDomain != "fr.example" || p.Learn != 24*time.Hour || p.Denials != 3 || p.RateFactor != d.RateFactor || p.RateFloor != d.RateFloor || p.Memory != d.Memory {
		t.Errorf("%+v", p)
	}
	if len(p.Hours) != 1 || p.Hours[0].From != 450 || p.Hours[0].To != 1440 || !slices.Equal(p.Hours[0].Days, []time.Weekday{time.Monday, time.Friday}) || p.Hours[0].Zone != time.UTC {
		t.Errorf("%+v", p.Hours)
	}
}

// TestWatcher: a finding is counted, noted and put into the outbox, and what is usual is known
// again after a restart, from the file and what the access log has since.
func TestWatcher(t *testing.T) {
	dir := t.TempDir()
	access, err := audit.Open(filepath.Join(dir, "access"), audit.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer access.Close()
	policy := anomaly.DefaultPolicy()
	policy.Denials = 4
	var notes []map[string]string
	var put []notify.Notice
	now := time.UnixMilli(1767225600000)
	fresh := func() *watcher {
		w := &watcher{node: "fr-1", file: filepath.Join(dir, "anomaly.json"), log: slog.New(slog.DiscardHandler), now: func() time.Time { return now }, written: now,
			detector: anomaly.New(policy), cluster: "c", found: prometheus.NewCounterVec(prometheus.CounterOpts{Name: "found"}, []string{"rule"})}
		w.note = func(_ context.Context, subject string, what map[string]string) error {
			notes = append(notes, what)
			return nil
		}
		w.put = func(l ...notify.Notice) error {
			put = append(put, l...)
			return nil
		}
		w.recall(filepath.Join(dir, "access"))
		return w
	}
	deny := func(w *watcher) {
		now = now.Add(time.Second)
		e := audit.Entry{Time: now.UnixMilli(), Node: "fr-1", Principal: "spiffe://fr.example/service/x", Action: "encrypt", Resource: "a/b", Outcome: "denied", Count: 1}
		if err := access.Append(t.Context(), e); err != nil {
			t.Fatal(err)
		}
		if w != nil {
			w.take(t.Context(), []audit.Entry{e})
		}
	}
	w := fresh()
	deny(w)
	deny(w)
	if err := w.remember(); err != nil {
		t.Fatal(err)
	}
	deny(nil) // it is stopped before it has written that
	w = fresh()
	if len(notes)+len(put) != 0 {
		t.Fatalf("%v, %v", notes, put)
	}
	deny(w)
	if len(notes) != 1 || len(put) != 1 {
		t.Fatalf("%v, %v", notes, put)
	}
	reg := prometheus.NewRegistry()
	if err := reg.Register(w.found); err != nil {
		t.Fatal(err)
	}
	if l, err := reg.Gather(); err != nil || len(l) != 1 || l[0].GetMetric()[0].GetCounter().GetValue() != 1 {
		t.Errorf("%v, %v", l, err)
	}
	n := put[0]
	if n.Kind != notify.KindAnomaly || n.Subject != "spiffe://fr.example/service/x" || n.Cluster != "c" || n.Node != "fr-1" || !strings.Contains(n.Text, "denied 4 times") || !slices.Contains(notify.Kinds(), n.Kind) {
		t.Errorf("%+v", n)
	}
	if notes[0]["rule"] != anomaly.Denials || notes[0]["text"] != n.Text {
		t.Errorf("%v", notes[0])
	}
	// What it remembers is written now and then; a file that cannot be read is no obstacle.
	now = now.Add(rememberEvery)
	if err := os.Remove(w.file); err != nil {
		t.Fatal(err)
	}
	deny(w)
	if _, err := os.Stat(w.file); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(w.file, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	w = fresh()
	w.note = func(context.Context, string, map[string]string) error { return errors.New("the disk is full") }
	for range 4 {
		deny(w)
	}
	if len(put) != 2 {
		t.Errorf("%+v", put)
	}
}
