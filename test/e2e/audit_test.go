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

// verifier runs conclave audit verify as an auditor without an identity would.
type verifier struct {
	site
	report audit.DirReport // of the last run
}

func (v *verifier) run(ctx context.Context, dir string, args ...string) (harness.Result, error) {
	r, err := harness.Run(ctx, v.c.Bin.Conclave, nil, nil, append([]string{"audit", "verify", dir, "--cluster", v.c.Vars["CONCLAVE_CLUSTER"], "-o", "json"}, args...)...)
	v.report = audit.DirReport{}
	return r, errors.Join(err, json.Unmarshal([]byte(r.Stdout), &v.report))
}

// collect brings the exports of all nodes together, the cluster log first.
func (v *verifier) collect(dir string) error {
	export := func(site string) string { return filepath.Join(v.c.Dir, site, "export") }
	if err := errors.Join(os.RemoveAll(dir), os.CopyFS(dir, os.DirFS(export("fr")))); err != nil {
		return err
	}
	for _, site := range []string{"de", "jp"} {
		node := v.c.Nodes[site].ID
		if err := os.CopyFS(filepath.Join(dir, "access", node), os.DirFS(filepath.Join(export(site), "access", node))); err != nil {
			return err
		}
	}
	return nil
}

// since reports what is missing for all logs to verify, cosigned, with what happened
// since an instant.
func (v *verifier) since(ctx context.Context, dir string, began time.Time) error {
	r, err := v.run(ctx, dir)
	if err = errors.Join(err, r.Err()); err != nil {
		return err
	}
	for _, l := range v.report.Logs {
		if l.Newest.Before(began) || l.Cosigned < l.Size {
			return fmt.Errorf("%s: newest leaf %v, %d of %d leaves cosigned", l.Log, l.Newest, l.Cosigned, l.Size)
		}
	}
	if len(v.report.Logs) != 4 {
		return fmt.Errorf("%d logs", len(v.report.Logs))
	}
	return nil
}

// flip changes a byte in every bundle of entries; partial ones of before are there too.
func flip(dir string) error {
	files, err := filepath.Glob(filepath.Join(dir, "tile", "entries", "*.p", "*"))
	if err != nil || len(files) == 0 {
		return fmt.Errorf("no entries are exported: %w", err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			return err
		}
		b[len(b)/2] ^= 1
		if err := os.WriteFile(file, b, 0o600); err != nil {
			return err
		}
	}
	return nil
}

// TestAuditVerify: what the nodes export verifies offline with the operations that were
// asked for in it; what is cosigned and is changed afterwards does not.
func TestAuditVerify(t *testing.T) {
	v := &verifier{site: site{t, cluster(t)}}
	name := unique("audited")
	v.key("coalition", name, kms.Encrypt, "")
	v.rotate("coalition", name, 2)
	began := time.Now()
	for _, n := range v.c.All() {
		v.decrypts(n.Site, "coalition", name, v.encrypt(n.Site, "coalition", name, "text"), "text")
	}
	seen, collected := filepath.Join(t.TempDir(), "seen.json"), filepath.Join(t.TempDir(), "collected")
	err := harness.Within(t.Context(), 90*time.Second, "all logs with the operations are cosigned and exported", func(ctx context.Context) error {
		if err := v.collect(collected); err != nil {
			return err
		}
		return v.since(ctx, collected, began)
	})
	if err != nil {
		t.Fatal(err)
	}
	if v.report.Evidence == 0 || v.report.States == 0 || v.report.Tail != 0 {
		t.Errorf("report %+v", v.report)
	}
	t.Logf("%d commands, %d checkpoints, state compared at %d places, evidence of %d decisions; cosigned and exported %v after the operations",
		v.report.Commands, v.report.Checkpoints, v.report.States, v.report.Evidence, time.Since(began).Round(time.Second))
	if r, err := v.run(t.Context(), collected, "--remember", seen); err != nil || r.Code != 0 {
		t.Fatalf("again: %v, %v", err, r.Err())
	}

	altered := filepath.Join(t.TempDir(), "altered")
	if err := errors.Join(os.CopyFS(altered, os.DirFS(collected)), flip(filepath.Join(altered, "access", "fr-1"))); err != nil {
		t.Fatal(err)
	}
	if r, _ := v.run(t.Context(), altered); r.Code == 0 {
		t.Error("an altered entry is not found")
	}
	// A log less than was seen.
	if err := errors.Join(os.RemoveAll(altered), os.CopyFS(altered, os.DirFS(collected)), os.RemoveAll(filepath.Join(altered, "access", "jp-1"))); err != nil {
		t.Fatal(err)
	}
	if r, err := v.run(t.Context(), altered); err != nil || r.Code != 0 {
		t.Errorf("without one access log: %v, %v", err, r.Err())
	}
	if r, _ := v.run(t.Context(), altered, "--since", seen); r.Code == 0 {
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
