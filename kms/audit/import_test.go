package audit

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

// TestEvidenceOfImports: the evidence for a key that was brought from outside rests on
// the decision to let it in, and on no other.
func TestEvidenceOfImports(t *testing.T) {
	w := newWorld(t)
	w.Announce()
	w.AllowImport()
	other := w.ImportKey("coalition", "other", kms.Encrypt)
	id := w.ImportKey("coalition", "brought", kms.Encrypt)
	rotated := w.Rotate("coalition", "brought")

	e := mustBuild(t, w, id)
	r, err := VerifyEvidence(e, w.State().Cluster())
	if err != nil {
		t.Fatal(err)
	}
	if r.Version != 1 || len(e.Key) != 0 || !strings.Contains(strings.Join(r.Checks, " "), "made it of material from outside") {
		t.Errorf("version %d, %q", r.Version, r.Checks)
	}
	for what, c := range map[string]struct {
		of    string
		alter func(*Evidence)
		kind  kms.Kind
	}{
		"a rotation":              {rotated, func(*Evidence) {}, 0},
		"without the import":      {rotated, func(e *Evidence) { e.Governance = e.Governance[:len(e.Governance)-1] }, 0}, // as where it is erased
		"the import twice":        {rotated, func(e *Evidence) { e.Governance = append(e.Governance, e.Governance[len(e.Governance)-1]) }, kms.Exists},
		"another key's import":    {rotated, func(e *Evidence) { e.Governance = append(e.Governance, mustBuild(t, w, other).Decision) }, kms.Invalid},
		"an import afterwards":    {rotated, func(e *Evidence) { e.Later = append(e.Later, mustBuild(t, w, other).Decision) }, kms.Invalid},
		"of another key's":        {id, func(e *Evidence) { e.Decision.Execution = mustBuild(t, w, other).Decision.Execution }, kms.Invalid},
		"a creation besides":      {id, func(e *Evidence) { e.Key = mustBuild(t, w, id).Decision.Execution }, kms.Invalid},
		"fewer approvals":         {id, func(e *Evidence) { e.Decision.Votes = e.Decision.Votes[:1] }, kms.NeedsApproval},
		"without the policy":      {id, func(e *Evidence) { e.Governance = slices.Delete(e.Governance, 0, 1) }, kms.Conflict},
		"with a receipt":          {id, func(e *Evidence) { e.Receipts = mustBuild(t, w, rotated).Receipts }, kms.Invalid},
		"executed by an Execute":  {id, func(e *Evidence) { e.Decision.Execution = e.Governance[0].Execution }, kms.Invalid},
		"a rotation by an import": {rotated, func(e *Evidence) { e.Decision.Execution = mustBuild(t, w, id).Decision.Execution }, kms.Invalid},
	} {
		bad := mustBuild(t, w, c.of)
		c.alter(&bad)
		if _, err := VerifyEvidence(bad, ""); c.kind != 0 && !errors.Is(err, c.kind) || c.kind == 0 && err != nil {
			t.Errorf("%s: %v, want kind %v", what, err, c.kind)
		}
	}
	gone := w.Propose(kms.ActionDestroy, "key/coalition/brought", approval.VersionParams{Version: 1})
	w.ApproveAll(gone)
	w.Advance(7 * 24 * time.Hour)
	w.Execute(gone)
	if _, err := BuildEvidence(w.State(), id); !errors.Is(err, kms.NotFound) {
		t.Errorf("of an erased import: %v", err)
	}
	mustBuild(t, w, w.Rotate("coalition", "brought"))
}
