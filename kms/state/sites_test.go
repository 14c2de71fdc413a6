package state_test

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// TestSite adds a site, lets a node of it join, changes its CAs, and removes it.
func TestSite(t *testing.T) {
	w := populated(t)
	w.AddSite("it", 2)
	s := w.State()
	if it, ok := s.Site("it"); !ok || it.TrustDomain != "it.example" || len(s.Sites()) != 4 || s.Sites()[2].ID != "it" || s.SiteRevision("it") != 1 {
		t.Errorf("sites %+v", s.Sites())
	}
	w.JoinWhole("node-it-1", "it")
	w.Promote("node-it-1")
	w.Advance(time.Minute)
	w.Do("node-it-1", w.KeyringCommand("rome", "it", "fr"), statetest.As(w.Operator("it")))
	restoreBoth(t, w.State())

	// Who is in the bundle speaks for the site, so it must agree.
	bundle := [][]byte{w.CA("it").Certificate.Raw, w.CA("jp").Certificate.Raw}
	id := w.Propose(kms.ActionSite, "site/it", approval.SiteParams{Change: approval.SiteCAs, CAs: bundle})
	w.Approve(id, "de-1", "jp-1")
	progress(t, w, id, "open")
	w.Approve(id, "it-1")
	r := w.Execute(id)
	if it, _ := w.State().Site("it"); len(it.CAs) != 2 || !bytes.Equal(it.CAs[1], bundle[1]) || w.State().SiteRevision("it") != 2 || r.Events[1].Site != "it" {
		t.Errorf("site %+v, events %+v", it, r.Events)
	}
	if it, _ := s.Site("it"); len(it.CAs) != 1 {
		t.Error("an older state has changed")
	}
	restoreBoth(t, w.State())

	// It goes when nothing stands on it any more.
	remove := approval.SiteParams{Change: approval.SiteRemove}
	refused := func(says string) {
		t.Helper()
		p := w.Proposal(kms.ActionSite, "site/it", remove)
		if r := w.Apply(w.Command(fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))); r.Kind != kms.Conflict || !strings.Contains(r.Message, says) {
			t.Errorf("remove: %v, want %q", r.Err(), says)
		}
	}
	refused("has node node-it-1")
	w.RemoveNode("node-it-1", false)
	refused("keyring rome is resident")

	w.AddSite("pl", 1)
	p := w.Proposal(kms.ActionSite, "site/pl", remove)
	if r := w.Apply(w.Command(fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))); r.Kind != kms.Conflict || !strings.Contains(r.Message, "custodian pl-1") {
		t.Error(r.Err())
	}
	leaving := statetest.Record("pl-1", "pl", 0, w.Custodian("pl-1"))
	leaving.Revoked = true
	revoke := w.Propose(kms.ActionCustodian, "custodian/pl-1", approval.CustodianParams{Custodian: leaving})
	w.Approve(revoke, "de-1", "pl-1")
	w.Execute(revoke)
	either := grouped(approval.Group{Need: 1, Sites: []approval.SiteWeight{{Name: "fr", Weight: 1, Approvals: 1}, {Name: "pl", Weight: 1, Approvals: 1}}})
	w.Carry(kms.ActionPolicy, "policy/strict", either)
	if r := w.Apply(w.Command(fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))); r.Kind != kms.Conflict || !strings.Contains(r.Message, "policy strict") {
		t.Error(r.Err())
	}
	w.Carry(kms.ActionPolicy, "policy/strict", approval.PolicyParams{Rules: statetest.Policies(3)[1].Rules})
	before := w.State()
	w.Carry(kms.ActionSite, "site/pl", remove)
	if _, there := w.State().Site("pl"); there || len(w.State().Sites()) != 4 {
		t.Error("site pl is still there")
	}
	w.Refuse(kms.Denied, fr, w.KeyringCommand("warsaw", "fr"), statetest.As(w.Operator("pl")))
	restoreBoth(t, w.State())
	if err := w.State().Extends(before); err != nil {
		t.Error(err)
	}
	if before.Extends(w.State()) == nil {
		t.Error("a state from before a removal extends one after it")
	}
	// Neither its name nor its trust domain comes back.
	for name, target := range map[string]string{"the name": "site/pl", "the trust domain": "site/pl2"} {
		p := w.Proposal(kms.ActionSite, target, approval.SiteParams{Change: approval.SiteAdd, TrustDomain: "pl.example", CAs: bundle[:1]})
		if r := w.Apply(w.Command(fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))); r.Kind != kms.Exists {
			t.Errorf("%s: %v", name, r.Err())
		}
	}
}

// TestSiteRefused: what the state machine does not take of a proposal about a site.
func TestSiteRefused(t *testing.T) {
	w := populated(t)
	fine := approval.SiteParams{Change: approval.SiteAdd, TrustDomain: "it.example", CAs: [][]byte{w.CA("fr").Certificate.Raw}}
	for name, c := range map[string]struct {
		kind   kms.Kind
		target string
		change func(*approval.SiteParams)
	}{
		"it exists":                 {kms.Exists, "site/fr", func(*approval.SiteParams) {}},
		"a taken trust domain":      {kms.Exists, "site/it", func(p *approval.SiteParams) { p.TrustDomain = "fr.example" }},
		"no trust domain":           {kms.Invalid, "site/it", func(p *approval.SiteParams) { p.TrustDomain = "" }},
		"a bad trust domain":        {kms.Invalid, "site/it", func(p *approval.SiteParams) { p.TrustDomain = "it.example/x" }},
		"no CA":                     {kms.Invalid, "site/it", func(p *approval.SiteParams) { p.CAs = nil }},
		"rubbish as a CA":           {kms.Invalid, "site/it", func(p *approval.SiteParams) { p.CAs = [][]byte{{1, 2, 3}} }},
		"too many CAs":              {kms.Invalid, "site/it", func(p *approval.SiteParams) { p.CAs = make([][]byte, 17) }},
		"no change":                 {kms.Invalid, "site/it", func(p *approval.SiteParams) { p.Change = "" }},
		"an unknown change":         {kms.Invalid, "site/it", func(p *approval.SiteParams) { p.Change = "move" }},
		"a bundle for nobody":       {kms.NotFound, "site/it", func(p *approval.SiteParams) { p.Change, p.TrustDomain = approval.SiteCAs, "" }},
		"another trust domain":      {kms.Invalid, "site/fr", func(p *approval.SiteParams) { p.Change = approval.SiteCAs }},
		"the same bundle":           {kms.Conflict, "site/fr", func(p *approval.SiteParams) { p.Change, p.TrustDomain = approval.SiteCAs, "" }},
		"removal of nobody":         {kms.NotFound, "site/it", func(p *approval.SiteParams) { *p = approval.SiteParams{Change: approval.SiteRemove} }},
		"removal with a bundle":     {kms.Invalid, "site/fr", func(p *approval.SiteParams) { p.Change, p.TrustDomain = approval.SiteRemove, "" }},
		"removal of a site in use":  {kms.Conflict, "site/jp", func(p *approval.SiteParams) { *p = approval.SiteParams{Change: approval.SiteRemove} }},
		"the target is no site":     {kms.Invalid, "node/fr", func(*approval.SiteParams) {}},
		"a name that cannot be one": {kms.Invalid, "site/it", func(p *approval.SiteParams) { p.TrustDomain = "IT.example" }},
	} {
		params := fine
		c.change(&params)
		p := w.Proposal(kms.ActionSite, "site/it", params)
		p.Target, p.Revision = c.target, w.State().SiteRevision(strings.TrimPrefix(c.target, "site/"))
		if r := w.Apply(w.Command(fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))); r.Kind != c.kind {
			t.Errorf("%s: got %v, want %v", name, r.Err(), c.kind)
		}
	}
	w.Carry(kms.ActionSite, "site/it", fine)
}

// TestSiteNeedsRule: a policy from before sites could change has no rule for it, and
// then nobody may.
func TestSiteNeedsRule(t *testing.T) {
	policies := statetest.Policies(3)
	policies[0].Rules = policies[0].Rules[:4]
	w := statetest.New(t, statetest.Options{Policies: policies})
	w.Announce()
	p := w.Proposal(kms.ActionSite, "site/jp", approval.SiteParams{Change: approval.SiteRemove})
	r := w.Apply(w.Command(fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer)))
	if r.Kind != kms.Invalid || !strings.Contains(r.Message, "no rule") {
		t.Errorf("without a rule: %v", r.Err())
	}
	w.Carry(kms.ActionPolicy, "policy/governance", approval.PolicyParams{Rules: statetest.Policies(3)[0].Rules})
	w.AddSite("it", 0)
}
