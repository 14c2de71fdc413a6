package interop

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/pqc"
)

// TestAttestationIsNamed: the one thing that only the Go verifier checks. A forged
// attestation document that custodians and the node signed all the same is refused by
// it; the Python verifier says that it did not look.
func TestAttestationIsNamed(t *testing.T) {
	w := attested(t)
	ed := editor{t: t}
	all := w.State().Proposals()
	i := slices.IndexFunc(all, func(p state.Proposal) bool { return p.Content.Action == kms.ActionNode })
	e, err := audit.BuildEvidence(w.State(), all[i].ID)
	if err != nil {
		t.Fatal(err)
	}
	p, err := approval.ParseProposal(e.Decision.Proposal)
	if err != nil {
		t.Fatal(err)
	}
	params, err := p.NodeParams()
	if err != nil {
		t.Fatal(err)
	}
	params.Root.Attestation[len(params.Root.Attestation)/2] ^= 1
	_, id, _ := approval.ParseTarget(p.Target)
	number := uint32(2) // the first root after that of the genesis
	digest, err := pqc.Digest(pqc.SuiteID(params.Root.SigningSuite), approval.RootMessage(w.State().Cluster(), id, number, params.Root), []byte(approval.RootContext))
	if err == nil {
		params.Possession, err = w.RootWith(id, params.Root.Signing).Sign(t.Context(), digest)
	}
	if err != nil {
		t.Fatal(err)
	}
	p.Parameters = canon.Marshal(params)
	d, ok := ed.redecided(w, e.Decision, p.Marshal())
	if !ok {
		t.Fatal("the votes cannot be made again")
	}
	e.Decision = d
	if _, err := audit.VerifyEvidence(e, e.Cluster); err == nil {
		t.Error("a forged attestation document is accepted")
	}
	path := filepath.Join(t.TempDir(), "evidence.json")
	if err := os.WriteFile(path, e.Marshal(), 0o600); err != nil {
		t.Fatal(err)
	}
	v := startVerifier(t)
	got := v.ask(t, e.Cluster, path)
	v.stop(t)
	named := slices.ContainsFunc(got.NotChecked, func(s string) bool { return strings.Contains(s, "attestation documents") && strings.Contains(s, id) })
	if got.Verdict != "accept" || !named {
		t.Errorf("the Python verifier says %+v", got)
	}
}
