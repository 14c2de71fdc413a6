package audit

import (
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// newWorld founds a cluster with a keyring and a key.
func newWorld(t testing.TB) *statetest.World {
	t.Helper()
	w := statetest.New(t, statetest.Options{})
	w.CreateKeyring("coalition", "de", "fr", "jp")
	w.CreateKey("coalition", "orders", kms.Encrypt)
	return w
}

const ordersTarget = "key/coalition/orders"

// govern changes policies and custodians, all within the same millisecond of the
// cluster's clock: fr-3 joins, de-2 leaves, jp-1 gets another credential, and the
// policy standard takes three approvals to rotate.
func govern(t testing.TB, w *statetest.World) {
	t.Helper()
	add := statetest.Record("fr-3", "fr", 0, w.AddCustodianKey("fr-3"))
	w.Carry(kms.ActionCustodian, "custodian/fr-3", approval.CustodianParams{Custodian: add})
	gone, _ := w.State().Custodian("de-2")
	gone.Revoked, gone.Revision = true, 0
	w.Carry(kms.ActionCustodian, "custodian/de-2", approval.CustodianParams{Custodian: gone})
	again := statetest.Record("jp-1", "jp", 0, w.AddCustodianKey("jp-1"))
	id := w.Propose(kms.ActionCustodian, "custodian/jp-1", approval.CustodianParams{Custodian: again})
	w.Approve(id, "de-1", "fr-1", "jp-2")
	w.Execute(id)
	standard, _ := w.State().Policy("standard")
	rules := slices.Clone(standard.Rules)
	for i := range rules {
		if rules[i].Action == kms.ActionRotate {
			rules[i].Approvals = 3
		}
	}
	id = w.Propose(kms.ActionPolicy, "policy/standard", approval.PolicyParams{Rules: rules})
	w.Approve(id, "fr-3", "de-1", "jp-1")
	w.Execute(id)
}

func mustBuild(t testing.TB, w *statetest.World, id string) Evidence {
	t.Helper()
	e, err := BuildEvidence(w.State(), id)
	if err != nil {
		t.Fatalf("%v: %v", err, errors.Unwrap(err))
	}
	return e
}

// rotated returns a world with a governed past and a rotation approved by fr-3,
// de-1 and jp-1, and its evidence.
func rotated(t testing.TB) (*statetest.World, string, Evidence) {
	t.Helper()
	w := newWorld(t)
	govern(t, w)
	id := w.Propose(kms.ActionRotate, ordersTarget, nil)
	w.Approve(id, "fr-3", "de-1", "jp-1")
	w.Commit(id)
	w.GiveReceipts()
	return w, id, mustBuild(t, w, id)
}

func TestEvidenceOfARotation(t *testing.T) {
	w, id, e := rotated(t)
	file := e.Marshal()
	parsed, err := ParseEvidence(file)
	if err != nil {
		t.Fatal(err)
	}
	r, err := VerifyEvidence(parsed, w.State().Cluster())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d bytes\n%s\nnotes: %s", len(file), strings.Join(r.Checks, "\n"), strings.Join(r.Notes, "\n"))
	var who []string
	for _, a := range r.Approvals {
		who = append(who, a.Custodian+"@"+a.Site)
	}
	if got := strings.Join(who, " "); got != "de-1@de fr-3@fr jp-1@jp" {
		t.Errorf("approvals: %s", got)
	}
	if !r.Pinned || r.Proposal != id || r.Version != 2 || len(r.Receipts) != 3 || r.Rule.Approvals != 3 || r.Content.Target != ordersTarget {
		t.Errorf("%+v", r)
	}
	if len(e.Governance) != 4 || len(r.Checks) < 10 {
		t.Errorf("%d governance decisions, %d checks", len(e.Governance), len(r.Checks))
	}
	loose, err := VerifyEvidence(parsed, "")
	if err != nil || loose.Pinned || len(loose.Notes) <= len(r.Notes) {
		t.Errorf("without a cluster: %v %+v", err, loose)
	}
	if _, err := VerifyEvidence(parsed, strings.Repeat("0", 32)); !errors.Is(err, kms.Denied) {
		t.Errorf("for another cluster: %v", err)
	}
}

func TestEvidenceOfEveryAction(t *testing.T) {
	w := newWorld(t)
	ids := map[string]string{"rotate": w.Rotate("coalition", "orders")}
	w.Rotate("coalition", "orders")
	ids["suspend"] = w.Carry(kms.ActionSuspend, ordersTarget, nil)
	ids["resume"] = w.Carry(kms.ActionResume, ordersTarget, nil)
	ids["deactivate"] = w.Carry(kms.ActionDeactivate, ordersTarget, approval.VersionParams{Version: 1})
	ids["compromise"] = w.Carry(kms.ActionCompromise, ordersTarget, approval.VersionParams{Version: 1})
	standard, _ := w.State().Policy("standard")
	ids["policy"] = w.Carry(kms.ActionPolicy, "policy/standard", approval.PolicyParams{Rules: standard.Rules})
	ids["custodian"] = w.Carry(kms.ActionCustodian, "custodian/fr-3",
		approval.CustodianParams{Custodian: statetest.Record("fr-3", "fr", 0, w.AddCustodianKey("fr-3"))})
	destroy := w.Propose(kms.ActionDestroy, ordersTarget, approval.VersionParams{Version: 1})
	w.ApproveAll(destroy)
	w.Advance(7 * 24 * time.Hour)
	w.Execute(destroy)
	ids["destroy"] = destroy

	for name, id := range ids {
		e := mustBuild(t, w, id)
		r, err := VerifyEvidence(e, w.State().Cluster())
		if err != nil || string(r.Content.Action) != name {
			t.Errorf("%s: %v, %q", name, err, r.Content.Action)
		}
		// The command that made version 1 was erased with it: said, not hidden.
		if onKey := strings.HasPrefix(r.Content.Target, "key/"); onKey != (len(r.Notes) == 2) {
			t.Errorf("%s: notes %q", name, r.Notes)
		}
	}
}

// TestEvidenceOfARetirement: evidence names what was asked of the use of a version, and
// that the custodians went over it.
func TestEvidenceOfARetirement(t *testing.T) {
	w := newWorld(t)
	w.Announce()
	w.Rotate("coalition", "orders")
	standard, _ := w.State().Policy("standard")
	rules := slices.Clone(standard.Rules)
	for i, r := range rules {
		if r.Action == kms.ActionDeactivate {
			rules[i].Unused = 48 * state.UseHour
		}
	}
	w.Carry(kms.ActionPolicy, "policy/standard", approval.PolicyParams{Rules: rules})
	id := w.Carry(kms.ActionDeactivate, ordersTarget, approval.VersionParams{Version: 1, Override: true})
	r, err := VerifyEvidence(mustBuild(t, w, id), w.State().Cluster())
	if err != nil || !slices.ContainsFunc(r.Checks, func(c string) bool { return strings.Contains(c, "OVERRIDES") && strings.Contains(c, "48 hours") }) {
		t.Errorf("%v: %q", err, r.Checks)
	}
	// Two days without use, and every node heard.
	w.Rotate("coalition", "orders")
	start := w.Now()
	for range 51 {
		w.Advance(time.Hour)
		for _, n := range w.NodeIDs() {
			w.Do(n, state.ReportUse{From: start, Until: w.Now()})
		}
	}
	id = w.Carry(kms.ActionDeactivate, ordersTarget, approval.VersionParams{Version: 2})
	r, err = VerifyEvidence(mustBuild(t, w, id), w.State().Cluster())
	if err != nil || !slices.ContainsFunc(r.Notes, func(n string) bool { return strings.Contains(n, "reports of what they use") }) {
		t.Errorf("%v: %q", err, r.Notes)
	}
}

func TestBuildEvidenceRefuses(t *testing.T) {
	w := newWorld(t)
	refused := func(what, id string, kind kms.Kind) {
		t.Helper()
		if _, err := BuildEvidence(w.State(), id); !errors.Is(err, kind) {
			t.Errorf("%s: %v, want %v", what, err, kind)
		}
	}
	refused("no proposal", strings.Repeat("0", 32), kms.NotFound)
	id := w.Propose(kms.ActionRotate, ordersTarget, nil)
	refused("open", id, kms.Conflict)
	w.ApproveAll(id)
	refused("authorised", id, kms.Conflict)
	w.Commit(id)
	refused("no receipts", id, kms.Conflict)
	w.GiveReceipts()
	mustBuild(t, w, id)
	w.Rotate("coalition", "orders")
	destroy := w.Propose(kms.ActionDestroy, ordersTarget, approval.VersionParams{Version: 2})
	w.ApproveAll(destroy)
	w.Advance(7 * 24 * time.Hour)
	w.Execute(destroy)
	refused("destroyed since", id, kms.NotFound)
}

// TestEvidenceCountsAsTheStateDid: approvals that had ceased to count before the
// execution are not in the evidence, rejections that did not end it are.
func TestEvidenceCountsAsTheStateDid(t *testing.T) {
	w := newWorld(t)
	id := w.Propose(kms.ActionRotate, ordersTarget, nil)
	w.Approve(id, "fr-1", "de-2")
	gone, _ := w.State().Custodian("de-2")
	gone.Revoked, gone.Revision = true, 0
	w.Carry(kms.ActionCustodian, "custodian/de-2", approval.CustodianParams{Custodian: gone})
	w.Vote(id, "jp-2", approval.Reject)
	w.Approve(id, "de-1")
	w.Commit(id)
	w.GiveReceipts()
	// What comes later changes nothing.
	again := statetest.Record("fr-1", "fr", 0, w.AddCustodianKey("fr-1"))
	later := w.Propose(kms.ActionCustodian, "custodian/fr-1", approval.CustodianParams{Custodian: again})
	w.Approve(later, "de-1", "jp-1", "fr-2")
	w.Execute(later)
	e := mustBuild(t, w, id)
	r, err := VerifyEvidence(e, w.State().Cluster())
	if err != nil {
		t.Fatal(err)
	}
	if len(e.Governance) != 1 || len(r.Approvals) != 2 || r.Approvals[0].Custodian != "de-1" || r.Approvals[1].Custodian != "fr-1" ||
		len(r.Rejections) != 1 || r.Rejections[0].Custodian != "jp-2" {
		t.Errorf("%d governance decisions, %+v, %+v", len(e.Governance), r.Approvals, r.Rejections)
	}
}

func TestParseEvidenceRefuses(t *testing.T) {
	_, _, e := rotated(t)
	file := string(e.Marshal())
	for name, bad := range map[string]string{
		"nothing":          "",
		"not JSON":         "evidence",
		"another format":   strings.Replace(file, `"format": 2`, `"format": 3`, 1),
		"an unknown field": strings.Replace(file, `"format": 2`, `"format": 2, "signed": true`, 1),
		"a field twice":    strings.Replace(file, `"format": 2`, `"format": 2, "format": 2`, 1),
		"another case":     strings.Replace(file, `"format": 2`, `"Format": 2`, 1),
		"a tail":           file + "{}",
		"no final newline": strings.TrimSuffix(file, "\n"),
		"reformatted":      strings.ReplaceAll(file, "\n", " "),
	} {
		if _, err := ParseEvidence([]byte(bad)); !errors.Is(err, kms.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := ParseEvidence(make([]byte, MaxEvidence+1)); !errors.Is(err, kms.TooLarge) {
		t.Error(err)
	}
	var loose map[string]any
	if err := json.Unmarshal([]byte(file), &loose); err != nil || len(loose) != 8 {
		t.Errorf("as plain JSON: %v, %d fields", err, len(loose))
	}
}
