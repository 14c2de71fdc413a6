package sim

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// plant is an edit of the product's source that is a bug when CONCLAVE_PLANTED names it.
type plant struct {
	name    string
	file    string // below the module's root
	was, is string
}

// plants are compiled in by go build -overlay, so that no hook for them stands in
// the product. All go into one binary; a variable chooses.
var plants = []plant{
	{"signature", "kms/state/state.go",
		"if err := verifyBy(suite, signing, envelope, CommandContext, signature); err != nil {",
		`if err := verifyBy(suite, signing, envelope, CommandContext, signature); err != nil && planted != "signature" {`},
	{"time", "kms/state/clock.go",
		"if t.env.Time <= st.Time {",
		`if t.env.Time <= st.Time && planted != "time" {`},
	{"time", "kms/state/clock.go",
		"func (t *tx) advance() { t.clock = max(t.clock, t.reader().median()) }",
		"func (t *tx) advance() {\n\tif t.clock = max(t.clock, t.reader().median()); planted == \"time\" {\n\t\tt.clock = t.reader().median()\n\t}\n}"},
	{"custodian", "kms/state/proposals.go",
		"case old == c.Statement.Verdict:",
		`case old == c.Statement.Verdict && planted != "custodian":`},
	{"custodian", "kms/state/proposals.go",
		"		votes = slices.Delete(votes, i, i+1)",
		"		if planted != \"custodian\" {\n\t\t\tvotes = slices.Delete(votes, i, i+1)\n\t\t}"},
	{"custodian", "kms/approval/decide.go",
		"|| c.Revoked || counted[id] {",
		`|| c.Revoked || counted[id] && planted != "custodian" {`},
	{"custodian", "kms/approval/decide.go",
		"d := Decision{Approvals: len(counted), Sites: len(sites)}",
		"d := Decision{Approvals: len(counted), Sites: len(sites)}\n\tif planted == \"custodian\" {\n\t\td.Approvals = len(approvals)\n\t}"},
}

// finds are the words of the violation that each bug leads to.
var finds = map[string]string{
	"signature": "though no node signed it",
	"time":      "time ran backwards",
	"custodian": "a second time",
}

// The simulation finds each of three planted bugs, and nothing in the same binary without them.
func TestPlantedBugs(t *testing.T) {
	binary := overlaid(t)
	for name, words := range finds {
		t.Run(name, func(t *testing.T) {
			began := time.Now()
			sum := job{Seed: 1, Schedules: 2000, First: true, Limit: time.Minute, Binary: binary, Planted: name}.run(t)
			if len(sum.failed) == 0 {
				t.Fatalf("not found in %d schedules", sum.played)
			}
			all := strings.Join(sum.failed[0].Failures, "; ")
			if !strings.Contains(all, words) {
				t.Errorf("schedule %d failed, but not for this: %s", sum.failed[0].Seed, all)
			}
			t.Logf("found by schedule %d, after %d schedules and %v: %s", sum.failed[0].Seed, sum.played, time.Since(began).Round(time.Millisecond), sum.failed[0].Failures[0])
		})
	}
	t.Run("none", func(t *testing.T) {
		sum := job{Seed: 1, Schedules: 10, Binary: binary}.run(t)
		if len(sum.failed) > 0 || sum.played != 10 {
			t.Errorf("%d of %d schedules failed: %+v", len(sum.failed), sum.played, sum.failed)
		}
	})
}

// overlaid builds this package's tests over the edited sources.
func overlaid(t *testing.T) string {
	t.Helper()
	root, err := filepath.Abs("../../..")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	replace := map[string]string{}
	put := func(file, text string) {
		path := filepath.Join(dir, strings.ReplaceAll(file, "/", "_"))
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		replace[filepath.Join(root, file)] = path
	}
	texts := map[string]string{}
	for _, p := range plants {
		if _, ok := texts[p.file]; !ok {
			b, err := os.ReadFile(filepath.Join(root, p.file))
			if err != nil {
				t.Fatal(err)
			}
			texts[p.file] = string(b)
		}
		if strings.Count(texts[p.file], p.was) != 1 {
			t.Fatalf("%s no longer has %q once: plant the bug anew", p.file, p.was)
		}
		texts[p.file] = strings.Replace(texts[p.file], p.was, p.is, 1)
		put(p.file, texts[p.file])
	}
	for _, pkg := range []string{"kms/state", "kms/approval"} {
		put(pkg+"/planted_bug.go", "package "+filepath.Base(pkg)+"\n\nimport \"os\"\n\nvar planted = os.Getenv(\"CONCLAVE_PLANTED\")\n")
	}
	b, err := json.Marshal(map[string]any{"Replace": replace})
	if err != nil {
		t.Fatal(err)
	}
	overlay, binary := filepath.Join(dir, "overlay.json"), filepath.Join(dir, "sim.test")
	if err := os.WriteFile(overlay, b, 0o600); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command("go", "test", "-c", "-overlay", overlay, "-o", binary, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return binary
}
