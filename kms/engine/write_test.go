package engine

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/wire"
)

func TestIdempotency(t *testing.T) {
	w := newWorld(t, "")
	fr := w.at("fr").engine
	op := caller("operator", "fr")
	op.IdempotencyKey = "k1"
	ring := wire.CreateKeyringRequest{Name: "r", Residency: []string{"fr", "de"}, Policy: "standard"}
	first := check[wire.Keyring](t)(fr.CreateKeyring(bg, op, ring))
	index := w.cluster.State().Index()
	again := check[wire.Keyring](t)(fr.CreateKeyring(bg, op, ring))
	// The other node knows it too.
	other := check[wire.Keyring](t)(w.at("de").engine.CreateKeyring(bg, op, ring))
	if again.Revision != first.Revision || other.Created != first.Created || w.cluster.State().Index() != index {
		t.Error("a repetition did something")
	}
	changed := ring
	changed.Survive = true
	_, err := fr.CreateKeyring(bg, op, changed)
	wantKind(t, err, kms.Conflict)
	// Another caller's key of the same text is another key.
	other2 := caller("operator", "de")
	other2.IdempotencyKey = "k1"
	_, err = w.at("de").engine.CreateKeyring(bg, other2, ring)
	wantKind(t, err, kms.Exists)

	op.IdempotencyKey = "k2"
	key := wire.CreateKeyRequest{Name: "data", Purpose: "encrypt"}
	a := check[wire.Key](t)(fr.CreateKey(bg, op, "r", key))
	b := check[wire.Key](t)(fr.CreateKey(bg, op, "r", key))
	if a.ID != b.ID {
		t.Error("a repetition made another key")
	}
	op.IdempotencyKey = ""
	_, err = fr.CreateKey(bg, op, "r", key)
	wantKind(t, err, kms.Exists)

	op.IdempotencyKey = "k3"
	req := wire.OpenProposalRequest{Action: "rotate", Target: "key/r/data", Reason: "test"}
	p := check[wire.Proposal](t)(fr.OpenProposal(bg, op, req))
	q := check[wire.Proposal](t)(fr.OpenProposal(bg, op, req))
	if p.ID != q.ID || !bytes.Equal(p.Bytes, q.Bytes) {
		t.Error("a repetition opened another proposal")
	}
	op.IdempotencyKey = ""
	_, err = fr.OpenProposal(bg, op, req)
	wantKind(t, err, kms.Exists)

	s := w.statement("fr-a", approval.Approve, p)
	for range 2 {
		v := check[wire.Proposal](t)(fr.Vote(bg, op, p.ID, wire.VoteRequest{Statement: s}))
		if v.Approvals != 1 || len(v.Votes) != 1 {
			t.Errorf("%d approvals, %d votes", v.Approvals, len(v.Votes))
		}
	}
}

// A write whose outcome is unknown is found out with the same key.
func TestUnknownOutcome(t *testing.T) {
	w := newWorld(t, "")
	op := caller("operator", "fr")
	op.IdempotencyKey = "k"
	ring := wire.CreateKeyringRequest{Name: "r", Residency: []string{"fr"}, Policy: "standard"}
	w.cluster.set(func(c *memoryCluster) { c.lost = true })
	_, err := w.at("fr").engine.CreateKeyring(bg, op, ring)
	wantKind(t, err, kms.Unknown)
	w.cluster.set(func(c *memoryCluster) { c.lost = false })
	check[wire.Keyring](t)(w.at("fr").engine.CreateKeyring(bg, op, ring))
}

func TestCreateKeyringRefuses(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("taken", "fr")
	base := wire.CreateKeyringRequest{Name: "r", Residency: []string{"fr"}, Policy: "standard"}
	for what, x := range map[string]struct {
		change func(*wire.CreateKeyringRequest)
		want   kms.Kind
	}{
		"no name":        {func(q *wire.CreateKeyringRequest) { q.Name = "" }, kms.Invalid},
		"bad name":       {func(q *wire.CreateKeyringRequest) { q.Name = "../x" }, kms.Invalid},
		"taken":          {func(q *wire.CreateKeyringRequest) { q.Name = "taken" }, kms.Exists},
		"no residency":   {func(q *wire.CreateKeyringRequest) { q.Residency = nil }, kms.Invalid},
		"twice a site":   {func(q *wire.CreateKeyringRequest) { q.Residency = []string{"fr", "fr"} }, kms.Invalid},
		"unknown site":   {func(q *wire.CreateKeyringRequest) { q.Residency = []string{"fr", "us"} }, kms.Invalid},
		"elsewhere":      {func(q *wire.CreateKeyringRequest) { q.Residency = []string{"de", "jp"} }, kms.NotResident},
		"protection":     {func(q *wire.CreateKeyringRequest) { q.Protection = "magic" }, kms.Invalid},
		"unknown policy": {func(q *wire.CreateKeyringRequest) { q.Policy = "none" }, kms.NotFound},
		"receipts":       {func(q *wire.CreateKeyringRequest) { q.Receipts = "none" }, kms.Invalid},
		"staleness":      {func(q *wire.CreateKeyringRequest) { q.MaxStalenessMS = -1 }, kms.Invalid},
	} {
		q := base
		x.change(&q)
		_, err := w.at("fr").engine.CreateKeyring(bg, caller("operator", "fr"), q)
		if !errors.Is(err, x.want) {
			t.Errorf("%s: %v, want %v", what, err, x.want)
		}
	}
	_, err := w.at("fr").engine.CreateKeyring(bg, caller("service", "fr"), base)
	wantKind(t, err, kms.Denied)
	w.at("fr").dev.Fail(func(op string) error {
		if op == "random" {
			return errors.New("no entropy")
		}
		return nil
	})
	_, err = w.at("fr").engine.CreateKeyring(bg, caller("operator", "fr"), base)
	wantKind(t, err, kms.Unavailable)
	if _, ok := w.cluster.State().Keyring("r"); ok {
		t.Error("a keyring without the device's randomness")
	}
}

func TestProposalRefuses(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("r", "fr")
	w.key("r", "data", kms.Encrypt)
	base := wire.OpenProposalRequest{Action: "rotate", Target: "key/r/data", Reason: "test"}
	for what, x := range map[string]struct {
		change func(*wire.OpenProposalRequest)
		want   kms.Kind
	}{
		"no action":        {func(q *wire.OpenProposalRequest) { q.Action = "" }, kms.Invalid},
		"create":           {func(q *wire.OpenProposalRequest) { q.Action = "create" }, kms.Invalid},
		"no reason":        {func(q *wire.OpenProposalRequest) { q.Reason = "" }, kms.Invalid},
		"no such key":      {func(q *wire.OpenProposalRequest) { q.Target = "key/r/none" }, kms.NotFound},
		"no such keyring":  {func(q *wire.OpenProposalRequest) { q.Target = "key/none/data" }, kms.NotFound},
		"malformed target": {func(q *wire.OpenProposalRequest) { q.Target = "r/data" }, kms.Invalid},
		"wrong target":     {func(q *wire.OpenProposalRequest) { q.Target = "custodian/fr-a" }, kms.Invalid},
		"extra parameters": {func(q *wire.OpenProposalRequest) { q.Parameters.Version = 1 }, kms.Invalid},
		"too long":         {func(q *wire.OpenProposalRequest) { q.ExpiresInMS = (25 * time.Hour).Milliseconds() }, kms.Invalid},
		"in the past":      {func(q *wire.OpenProposalRequest) { q.ExpiresInMS = -1 }, kms.Invalid},
		"never":            {func(q *wire.OpenProposalRequest) { q.NotBefore = w.clock.Now().Add(48 * time.Hour) }, kms.Invalid},
		"not suspended":    {func(q *wire.OpenProposalRequest) { q.Action = "resume" }, kms.Conflict},
		"no custodian": {func(q *wire.OpenProposalRequest) {
			q.Action, q.Target = "custodian", "custodian/fr-c"
		}, kms.Invalid},
	} {
		q := base
		x.change(&q)
		_, err := w.at("fr").engine.OpenProposal(bg, caller("operator", "fr"), q)
		if !errors.Is(err, x.want) {
			t.Errorf("%s: %v, want %v", what, err, x.want)
		}
	}
	p := w.propose(kms.ActionRotate, "key/r/data", wire.ProposalParameters{})
	s := w.statement("fr-a", approval.Approve, p)
	s.Signature = bytes.Clone(s.Signature)
	s.Signature[5] ^= 1
	_, err := w.at("fr").engine.Vote(bg, caller("custodian", "fr"), p.ID, wire.VoteRequest{Statement: s})
	wantKind(t, err, kms.BadSignature)
	_, err = w.at("fr").engine.Vote(bg, caller("custodian", "fr"), strings.Repeat("0", 32), wire.VoteRequest{Statement: s})
	wantKind(t, err, kms.Invalid)
	s = w.statement("fr-a", approval.Approve, p)
	s.Verdict = "reject"
	_, err = w.at("fr").engine.Vote(bg, caller("custodian", "fr"), p.ID, wire.VoteRequest{Statement: s})
	wantKind(t, err, kms.BadSignature)
	_, err = w.at("fr").engine.Proposal(bg, caller("auditor", "fr"), "none")
	wantKind(t, err, kms.NotFound)
	_, err = w.at("fr").engine.Evidence(bg, caller("auditor", "fr"), p.ID)
	wantKind(t, err, kms.Conflict)
}

// What custodians see is decoded from the bytes that they sign.
func TestProposalsShowTheirParameters(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("r", "fr")
	w.key("r", "data", kms.Encrypt)
	cust := wire.Custodian{ID: "fr-a", Site: "fr", Revoked: true}
	p := w.propose(kms.ActionCustodian, "custodian/fr-a", wire.ProposalParameters{Custodian: &cust})
	if c := p.Content.Parameters.Custodian; c == nil || !c.Revoked || c.ID != "fr-a" || p.Content.Policy != kms.Governance {
		t.Errorf("%+v", p.Content)
	}
	var rules []wire.Rule
	for _, r := range testPolicies()[1].Rules {
		rules = append(rules, ruleView(r))
	}
	rules[0], rules[1] = rules[1], rules[0] // any order will do
	p = w.propose(kms.ActionPolicy, "policy/other", wire.ProposalParameters{Rules: rules})
	if n := len(p.Content.Parameters.Rules); n != len(rules) {
		t.Errorf("%d rules", n)
	}
	p = w.propose(kms.ActionDestroy, "key/r/data", wire.ProposalParameters{})
	if p.Rule == nil || p.Rule.DelayMS == 0 || p.Content.Reason != "because of the test" {
		t.Errorf("%+v", p)
	}
	if id := approval.ProposalID(p.Bytes); id != p.ID {
		t.Errorf("%s is not %s", id, p.ID)
	}
	p = w.vote(p, approval.Approve, "fr-a", "de-a")
	if p.Progress != "waiting" || p.ExecutableAt.Sub(p.AuthorisedAt) != 7*24*time.Hour || !strings.Contains(p.Summary, "waits until") {
		t.Errorf("%s: %s", p.Progress, p.Summary)
	}
	all := check[wire.Proposals](t)(w.at("fr").engine.Proposals(bg, caller("auditor", "fr"), wire.ProposalQuery{}))
	if len(all.Proposals) != 3 || all.Proposals[0].ID != p.ID {
		t.Errorf("%d proposals", len(all.Proposals))
	}
}

// Versions that are not active refuse, naming their state.
func TestVersionStates(t *testing.T) {
	w := newWorld(t, "")
	as := w.agents()
	w.keyring("r", "fr", "de", "jp")
	w.key("r", "data", kms.Encrypt)
	target := "key/r/data"
	e, svc := w.at("fr").engine, caller("service", "fr")
	var cts [][]byte
	for range 4 {
		r := check[wire.EncryptResponse](t)(e.Encrypt(bg, svc, "r", "data", wire.EncryptRequest{Plaintext: []byte("x")}))
		cts = append(cts, r.Ciphertext)
		if p := w.carry(as, kms.ActionRotate, target, wire.ProposalParameters{}); p.Progress != "executed" {
			t.Fatal(p.Summary)
		}
	}
	do := func(a kms.Action, n uint32) {
		t.Helper()
		if p := w.carry(as, a, target, wire.ProposalParameters{Version: n}); p.Progress != "executed" {
			t.Fatal(p.Summary)
		}
	}
	do(kms.ActionDeactivate, 1)
	do(kms.ActionCompromise, 2)
	p := w.propose(kms.ActionDestroy, target, wire.ProposalParameters{Version: 3})
	w.vote(p, approval.Approve, "fr-a", "de-a")
	w.settle(as)
	check[wire.DecryptResponse](t)(e.Decrypt(bg, svc, "r", "data", wire.DecryptRequest{Ciphertext: cts[2]}))
	w.clock.Advance(7 * 24 * time.Hour)
	w.tick()
	for range siteIDs {
		w.settle(as)
		w.clock.Advance(2 * time.Second)
	}
	w.settle(as)
	for i, s := range []string{"deactivated", "compromised", "destroyed"} {
		_, err := e.Decrypt(bg, svc, "r", "data", wire.DecryptRequest{Ciphertext: cts[i]})
		wantKind(t, err, kms.Conflict)
		if !strings.Contains(err.Error(), s) {
			t.Errorf("%q does not say %s", err, s)
		}
	}
	check[wire.DecryptResponse](t)(e.Decrypt(bg, svc, "r", "data", wire.DecryptRequest{Ciphertext: cts[3]}))
	do(kms.ActionCompromise, 5) // the primary: nothing is left for new operations
	_, err := e.Encrypt(bg, svc, "r", "data", wire.EncryptRequest{})
	wantKind(t, err, kms.Conflict)
	if !strings.Contains(err.Error(), "no primary version") {
		t.Error(err)
	}
}
