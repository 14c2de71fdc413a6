package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/test/harness"
)

// TestAuditVerify: what the nodes export verifies offline with the operations that were
// asked for in it; what is cosigned and is changed afterwards does not.
func TestAuditVerify(t *testing.T) {
	s := site{t, cluster(t)}
	id := s.c.Vars["CONCLAVE_CLUSTER"]
	name := unique("audited")
	s.key("coalition", name, kms.Encrypt, "")
	s.rotate("coalition", name, 2)
	began := time.Now()
	for _, n := range s.c.All() {
		s.decrypts(n.Site, "coalition", name, s.encrypt(n.Site, "coalition", name, "text"), "text")
	}
	export := func(site string) string { return filepath.Join(s.c.Dir, site, "export") }
	seen := filepath.Join(t.TempDir(), "seen.json")
	var report audit.DirReport
	verify := func(ctx context.Context, dir string, args ...string) (harness.Result, error) {
		r, err := harness.Run(ctx, s.c.Bin.Conclave, nil, nil, append([]string{"audit", "verify", dir, "--cluster", id, "-o", "json"}, args...)...)
		report = audit.DirReport{}
		return r, errors.Join(err, json.Unmarshal([]byte(r.Stdout), &report))
	}
	collected := filepath.Join(t.TempDir(), "collected")
	err := harness.Within(t.Context(), 90*time.Second, "all logs with the operations are cosigned and exported", func(ctx context.Context) error {
		if err := errors.Join(os.RemoveAll(collected), os.CopyFS(collected, os.DirFS(export("fr")))); err != nil {
			return err
		}
		for _, site := range []string{"de", "jp"} {
			node := s.c.Nodes[site].ID
			if err := os.CopyFS(filepath.Join(collected, "access", node), os.DirFS(filepath.Join(export(site), "access", node))); err != nil {
				return err
			}
		}
		r, err := verify(ctx, collected)
		if err = errors.Join(err, r.Err()); err != nil {
			return err
		}
		for _, l := range report.Logs {
			if l.Newest.Before(began) || l.Cosigned < l.Size {
				return fmt.Errorf("%s: newest leaf %v, %d of %d leaves cosigned", l.Log, l.Newest, l.Cosigned, l.Size)
			}
		}
		if len(report.Logs) != 4 {
			return fmt.Errorf("%d logs", len(report.Logs))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if report.Evidence == 0 || report.Checkpoints == 0 || report.States < 2 || report.Tail != 0 {
		t.Errorf("report %+v", report)
	}
	t.Logf("%d commands, %d checkpoints, state compared at %d places, evidence of %d decisions; cosigned and exported %v after the operations",
		report.Commands, report.Checkpoints, report.States, report.Evidence, time.Since(began).Round(time.Second))
	if r, err := verify(t.Context(), collected, "--remember", seen); err != nil || r.Code != 0 {
		t.Fatalf("again: %v, %v", err, r.Err())
	}

	// A byte of an entry.
	altered := filepath.Join(t.TempDir(), "altered")
	if err := os.CopyFS(altered, os.DirFS(collected)); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(altered, "access", "fr-1", "tile", "entries")
	files, err := filepath.Glob(filepath.Join(path, "*.p", "*"))
	if err != nil || len(files) == 0 {
		t.Fatalf("no entries in %s: %v", path, err)
	}
	b, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)/2] ^= 1
	if err := os.WriteFile(files[0], b, 0o600); err != nil {
		t.Fatal(err)
	}
	if r, _ := verify(t.Context(), altered); r.Code == 0 {
		t.Error("an altered entry is not found")
	}
	// A log less than was seen.
	if err := errors.Join(os.RemoveAll(altered), os.CopyFS(altered, os.DirFS(collected)), os.RemoveAll(filepath.Join(altered, "access", "jp-1"))); err != nil {
		t.Fatal(err)
	}
	if r, err := verify(t.Context(), altered); err != nil || r.Code != 0 {
		t.Errorf("without one access log: %v, %v", err, r.Err())
	}
	if r, _ := verify(t.Context(), altered, "--since", seen); r.Code == 0 {
		t.Error("a log that was seen and is missing is not noticed")
	}
}

// TestAuditExportOffline: a node that does not run exports the same logs, onto what it exported while it ran.
func TestAuditExportOffline(t *testing.T) {
	s := site{t, cluster(t)}
	n := s.c.Nodes["de"]
	if err := n.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	config := filepath.Join(s.c.Dir, "de", "conclaved.toml")
	dir := t.TempDir()
	for _, out := range []string{dir, dir, filepath.Join(s.c.Dir, "de", "export")} {
		r, err := harness.Run(t.Context(), s.c.Bin.Conclaved, nil, nil, "audit", "export", out, "--config", config)
		if err = errors.Join(err, r.Err()); err != nil {
			t.Fatal(err)
		}
		v, err := harness.Run(t.Context(), s.c.Bin.Conclave, nil, nil, "audit", "verify", out, "--cluster", s.c.Vars["CONCLAVE_CLUSTER"])
		if err = errors.Join(err, v.Err()); err != nil {
			t.Fatalf("%v\n%s", err, r.Stdout)
		}
	}
	if err := n.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
}
