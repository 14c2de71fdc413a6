package engine

import (
	"crypto/x509"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// drifting are the findings of a kind in a node's report.
func (w *world) drifting(site, kind string) (l []wire.Finding) {
	w.t.Helper()
	d := check[wire.Drift](w.t)(w.at(site).engine.Drift(bg, caller("auditor", site)))
	act := 0
	for i, f := range d.Findings {
		if f.Kind == kind {
			l = append(l, f)
		}
		if f.Act {
			act++
		}
		if i > 0 && f.Act && !d.Findings[i-1].Act {
			w.t.Error("what asks for something does not come first")
		}
		if f.Text == "" || f.Subject == "" {
			w.t.Errorf("%+v says nothing", f)
		}
	}
	if act != d.Act || len(d.Unknown) == 0 {
		w.t.Errorf("%d ask for something, the report says %d; it does not know %v", act, d.Act, d.Unknown)
	}
	return l
}

func TestDriftOfKeys(t *testing.T) {
	w := newWorld(t, "")
	as := w.agents()
	w.keyring("r", "fr", "de")
	const day = 24 * time.Hour
	check[wire.Key](t)(w.at("fr").engine.CreateKey(bg, caller("operator", "fr"), "r", wire.CreateKeyRequest{
		Name: "data", Purpose: "encrypt", RotationPeriodMS: (30 * day).Milliseconds()}))
	w.settle(as)
	pass := func(d, step time.Duration) {
		for ; d > 0; d -= step {
			w.clock.Advance(step)
			w.tick()
			w.settle(as)
		}
	}
	pass(time.Hour, 30*time.Minute)
	for _, kind := range []string{wire.DriftOverdue, wire.DriftReceipt, wire.DriftNode, wire.DriftRelease, wire.DriftDeactivated, wire.DriftOldVersion, wire.DriftUnused} {
		if l := w.drifting("jp", kind); len(l) > 0 {
			t.Errorf("in order, and yet: %+v", l)
		}
	}
	service := caller("service", "fr")
	old := check[wire.EncryptResponse](t)(w.at("fr").engine.Encrypt(bg, service, "r", "data", wire.EncryptRequest{Plaintext: []byte("x")})).Ciphertext
	pass(31*day, day)
	l := w.drifting("jp", wire.DriftOverdue)
	if len(l) != 1 || !l[0].Act || l[0].Subject != "key/r/data" || l[0].Version != 1 || !strings.Contains(l[0].Text, "proposal ") {
		t.Errorf("%+v", l)
	}
	// One node does not prove that it has the new version.
	open := w.cluster.State().ProposalsOpen()
	view, _ := proposalView(w.cluster.State(), open[0])
	w.vote(view, approval.Approve, "fr-a", "de-a")
	delete(as, "de-1")
	pass(2*time.Minute, 20*time.Second)
	if l := w.drifting("jp", wire.DriftReceipt); len(l) != 1 || l[0].Version != 2 || !slices.Equal(l[0].Nodes, []string{"de-1"}) {
		t.Errorf("%+v", l)
	}
	as = w.agents()
	pass(2*time.Hour, 20*time.Minute)
	if l := w.drifting("jp", wire.DriftReceipt); len(l) > 0 {
		t.Errorf("%+v", l)
	}
	// The old version goes on being used, then not, then it is deactivated and missed.
	decrypt := func() error {
		_, err := w.at("fr").engine.Decrypt(bg, service, "r", "data", wire.DecryptRequest{Ciphertext: old})
		return err
	}
	if err := decrypt(); err != nil {
		t.Fatal(err)
	}
	pass(2*time.Hour, 20*time.Minute)
	if l := w.drifting("jp", wire.DriftOldVersion); len(l) != 1 || l[0].Act || l[0].Version != 1 {
		t.Errorf("%+v", l)
	}
	pass(31*day, time.Hour)
	if l := w.drifting("jp", wire.DriftUnused); len(l) != 1 || l[0].Act || l[0].Version != 1 {
		t.Errorf("%+v", l)
	}
	w.carry(as, kms.ActionDeactivate, "key/r/data", wire.ProposalParameters{Version: 1})
	pass(2*time.Hour, 20*time.Minute)
	if l := w.drifting("jp", wire.DriftDeactivated); len(l) > 0 {
		t.Errorf("nobody asked for it: %+v", l)
	}
	wantKind(t, decrypt(), kms.Conflict)
	pass(2*time.Hour, 20*time.Minute)
	if l := w.drifting("jp", wire.DriftDeactivated); len(l) != 1 || !l[0].Act || l[0].Version != 1 {
		t.Errorf("%+v", l)
	}
}

func TestDriftOfNodes(t *testing.T) {
	w := newWorld(t, "")
	as := w.agents()
	w.keyring("r", "fr", "de")
	w.key("r", "sig", kms.Sign)
	w.settle(as)
	if l := w.drifting("fr", wire.DriftRelease); len(l) > 0 {
		t.Errorf("%+v", l)
	}
	var named []string
	for _, f := range w.drifting("fr", wire.DriftSuite) {
		named = append(named, f.Subject)
		if f.Act {
			t.Errorf("%+v", f)
		}
	}
	if !slices.Equal(named, []string{"suite/MLKEM768-P256", "suite/ECDSA-P256-SHA256"}) {
		t.Errorf("ageing: %v", named)
	}
	// One node of three is silent.
	w.clock.Advance(2 * time.Minute)
	for _, site := range []string{"fr", "de"} {
		if _, err := w.at(site).engine.submit(bg, attempt{}, state.Tick{}); err != nil {
			t.Fatal(err)
		}
	}
	if l := w.drifting("fr", wire.DriftNode); len(l) != 1 || l[0].Subject != "node/jp-1" || !l[0].Act {
		t.Errorf("%+v", l)
	}
	// Certificates: the sites' CAs stand until 2242, this node's own ends soon.
	e := w.at("fr").engine
	now := time.UnixMilli(w.cluster.State().Clock())
	for left, want := range map[time.Duration]string{certificateAhead + time.Hour: "", certificateAhead - time.Hour: "expires in 719h", -time.Hour: "has expired"} {
		e.cfg.Certificate = &x509.Certificate{NotAfter: now.Add(left)}
		l := w.drifting("fr", wire.DriftCertificate)
		if want == "" && len(l) > 0 || want != "" && (len(l) != 1 || l[0].Subject != "node/fr-1" || !strings.Contains(l[0].Text, want)) {
			t.Errorf("%v before its end: %+v", left, l)
		}
	}
}

// TestDriftHides leaves out what the caller may not read, and is refused to services.
func TestDriftHides(t *testing.T) {
	w := newWorld(t, DefaultAccess()+`forbid (principal in Role::"auditor", action == Action::"key:read", resource in Keyring::"secret");`)
	w.keyring("r", "fr")
	w.keyring("secret", "fr")
	w.key("secret", "sig", kms.Sign)
	d := check[wire.Drift](t)(w.at("fr").engine.Drift(bg, caller("auditor", "fr")))
	if d.Hidden == 0 {
		t.Errorf("nothing is left out: %+v", d)
	}
	for _, f := range d.Findings {
		if strings.Contains(f.Text+f.Subject, "secret") {
			t.Errorf("%+v", f)
		}
	}
	_, err := w.at("fr").engine.Drift(bg, caller("service", "fr"))
	wantKind(t, err, kms.Denied)
}

// TestDriftOfForbiddenSuites: what is of a suite that its policy forbids asks for
// something; the names come from people and go back to them.
func TestDriftOfForbiddenSuites(t *testing.T) {
	w := newWorld(t, "")
	as := w.agents()
	w.keyring("r", "fr", "de")
	w.key("r", "seal", kms.Sign)
	w.settle(as)
	if l := w.drifting("jp", wire.DriftForbidden); len(l) > 0 {
		t.Errorf("nothing is forbidden, and yet: %+v", l)
	}
	var rules []wire.Rule
	for _, r := range testPolicies()[1].Rules {
		rules = append(rules, ruleView(r))
	}
	set := func(suites []string) (wire.Proposal, error) {
		return w.at("de").engine.OpenProposal(bg, caller("operator", "de"), wire.OpenProposalRequest{
			Action: "policy", Target: "policy/" + testPolicies()[1].Name, Parameters: wire.ProposalParameters{Rules: rules, Forbid: suites}, Reason: "x"})
	}
	_, err := set([]string{"ROT13"})
	wantKind(t, err, kms.Invalid)
	p := check[wire.Proposal](t)(set([]string{"ECDSA-P256-SHA256", "MLKEM1024-P384"}))
	w.vote(p, approval.Approve, "fr-a", "de-a", "jp-a")
	w.settle(as)
	l := w.drifting("jp", wire.DriftForbidden)
	if len(l) == 0 || !l[0].Act || !strings.Contains(l[0].Text, "still used by") {
		t.Fatalf("%+v", l)
	}
	if !slices.ContainsFunc(l, func(f wire.Finding) bool {
		return f.Subject == "suite/ECDSA-P256-SHA256" && strings.Contains(f.Text, "key r/seal") && !strings.Contains(f.Text, "node")
	}) {
		t.Errorf("%+v", l)
	}
	policies := check[wire.Policies](t)(w.at("fr").engine.Policies(bg, caller("auditor", "fr")))
	if !slices.ContainsFunc(policies.Policies, func(p wire.Policy) bool {
		return slices.Equal(p.Forbid, []string{"MLKEM1024-P384", "ECDSA-P256-SHA256"})
	}) {
		t.Errorf("%+v", policies)
	}
	_, err = w.at("fr").engine.CreateKey(bg, caller("operator", "fr"), "r", wire.CreateKeyRequest{Name: "more", Purpose: "sign"})
	wantKind(t, err, kms.Conflict)
	// Who says nothing about suites leaves them as they are.
	if p := check[wire.Proposal](t)(set(nil)); !slices.Equal(p.Content.Parameters.Forbid, []string{"MLKEM1024-P384", "ECDSA-P256-SHA256"}) {
		t.Errorf("%+v", p.Content.Parameters.Forbid)
	}
}
