package sim

import (
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// plant is an edit of the product's source that is a bug when CONCLAVE_PLANTED names it.
type plant struct {
	name string
	edit
}

// plants are compiled in by go build -overlay, so that no hook for them stands in
// the product. All go into one binary; a variable chooses.
var plants = []plant{
	{"signature", edit{"kms/state/state.go",
		"	return wrongSignature(e, verifyBy(suite, signing, envelope, CommandContext, signature))",
		"	if planted == \"signature\" {\n\t\treturn nil\n\t}\n\treturn wrongSignature(e, verifyBy(suite, signing, envelope, CommandContext, signature))"}},
	{"time", edit{"kms/state/clock.go",
		"if t.env.Time <= st.Time {",
		`if t.env.Time <= st.Time && planted != "time" {`}},
	{"time", edit{"kms/state/clock.go",
		"func (t *tx) advance() { t.clock = max(t.clock, t.reader().median()) }",
		"func (t *tx) advance() {\n\tif t.clock = max(t.clock, t.reader().median()); planted == \"time\" {\n\t\tt.clock = t.reader().median()\n\t}\n}"}},
	{"custodian", edit{"kms/state/proposals.go",
		"case old == c.Statement.Verdict:",
		`case old == c.Statement.Verdict && planted != "custodian":`}},
	{"custodian", edit{"kms/state/proposals.go",
		"		votes = slices.Delete(votes, i, i+1)",
		"		if planted != \"custodian\" {\n\t\t\tvotes = slices.Delete(votes, i, i+1)\n\t\t}"}},
	{"custodian", edit{"kms/approval/decide.go",
		"|| c.Revoked || counted[id] {",
		`|| c.Revoked || counted[id] && planted != "custodian" {`}},
	{"custodian", edit{"kms/approval/decide.go",
		"d := Decision{Approvals: len(counted), Sites: len(sites)}",
		"d := Decision{Approvals: len(counted), Sites: len(sites)}\n\tif planted == \"custodian\" {\n\t\td.Approvals = len(approvals)\n\t}"}},
}

// finds are the words of the violation that each bug leads to.
var finds = map[string]string{
	"signature": "though no node signed it",
	"time":      "time ran backwards",
	"custodian": "a second time",
}

// The simulation finds each of three planted bugs, and nothing in the same binary without them.
func TestPlantedBugs(t *testing.T) {
	binary := planted(t)
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

// planted builds this package's tests with the bugs in them.
func planted(t *testing.T) string {
	t.Helper()
	o := newOverlay(t)
	for _, p := range plants {
		o.edit(p.edit)
	}
	for _, pkg := range []string{"kms/state", "kms/approval"} {
		o.put(pkg+"/planted_bug.go", "package "+filepath.Base(pkg)+"\n\nimport \"os\"\n\nvar planted = os.Getenv(\"CONCLAVE_PLANTED\")\n")
	}
	return o.build()
}
