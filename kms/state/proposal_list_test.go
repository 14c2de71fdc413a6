package state_test

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// TestProposalsBy holds every query against a filter over all proposals, and pages
// through each.
func TestProposalsBy(t *testing.T) {
	s := rich(t).State()
	all := s.Proposals()
	queries := []state.ProposalQuery{{}}
	for _, target := range []string{"", target("mail"), target("none"), "custodian/fr-9"} {
		for _, action := range []kms.Action{"", kms.ActionRotate, kms.ActionCompromise} {
			for _, waits := range []string{"", "fr-1", "nobody"} {
				for _, open := range []bool{false, true} {
					queries = append(queries, state.ProposalQuery{Open: open, Action: action, Target: target, Waits: waits})
				}
			}
		}
	}
	for _, q := range queries {
		var want []string
		for _, p := range all {
			_, progress, _ := s.Decision(p.ID)
			open := progress == string(state.Open) || progress == string(state.Authorised) || progress == state.Waiting
			if (!q.Open || open) && (q.Action == "" || p.Content.Action == q.Action) && (q.Target == "" || p.Content.Target == q.Target) &&
				(q.Waits == "" || s.WaitsFor(p, q.Waits)) {
				want = append(want, p.ID)
			}
		}
		for _, limit := range []int{0, 1, 3} {
			var got []string
			page := q
			for page.Limit = limit; ; {
				l, more := s.ProposalsBy(page)
				for _, p := range l {
					got = append(got, p.ID)
				}
				if limit > 0 && len(l) > limit || more && len(l) != limit {
					t.Fatalf("%+v: a page of %d, more: %t", page, len(l), more)
				}
				if !more {
					break
				}
				page.Before = l[len(l)-1].Index
			}
			if !slices.Equal(got, want) {
				t.Errorf("%+v in pages of %d: %d proposals, want %d", q, limit, len(got), len(want))
			}
		}
	}
	for _, p := range all {
		if got, ok := s.ProposalOpenedAt(p.Index); !ok || got.ID != p.ID {
			t.Errorf("at %d: %q, want %q", p.Index, got.ID, p.ID)
		}
	}
	if _, ok := s.ProposalOpenedAt(all[0].Index + 1); ok {
		t.Error("a proposal was found where none was opened")
	}
}

func TestWaitsFor(t *testing.T) {
	w := small(t)
	id := w.Propose(kms.ActionRotate, mail, nil)
	waits := func(want ...string) {
		t.Helper()
		p, _ := w.State().Proposal(id)
		var got []string
		for _, c := range append(w.State().Custodians(), approval.Custodian{ID: "nobody"}) {
			if w.State().WaitsFor(p, c.ID) {
				got = append(got, c.ID)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("it waits for %v, want %v", got, want)
		}
	}
	everybody := []string{"de-1", "de-2", "fr-1", "fr-2", "jp-1", "jp-2"}
	without := func(gone ...string) []string {
		return slices.DeleteFunc(slices.Clone(everybody), func(id string) bool { return slices.Contains(gone, id) })
	}
	waits(everybody...)
	w.Vote(id, "fr-1", approval.Approve)
	waits(without("fr-1")...)
	w.Vote(id, "jp-1", approval.Reject)
	waits(without("fr-1", "jp-1")...)
	leaving := statetest.Record("jp-2", "jp", 0, w.Custodian("jp-2"))
	leaving.Revoked = true
	w.Carry(kms.ActionCustodian, "custodian/jp-2", approval.CustodianParams{Custodian: leaving})
	waits(without("fr-1", "jp-1", "jp-2")...)
	w.Vote(id, "de-1", approval.Approve) // the quorum
	waits()
	id = w.Propose(kms.ActionSuspend, mail, nil)
	waits(without("jp-2")...)
	w.Advance(73 * time.Hour)
	waits()
	// The proposer's approval does not count.
	p := w.Proposal(kms.ActionRotate, mail, nil)
	p.Proposer = "spiffe://fr.example/custodian/fr-1"
	id = w.Open(p)
	waits(without("jp-2", "fr-1")...)
}

// BenchmarkProposals reads from 600 closed proposals on 12 keys what a page of the list
// and a look of the schedule take: neither grows with the number of all proposals.
func BenchmarkProposals(b *testing.B) {
	w := statetest.New(b, statetest.Options{})
	w.CreateKeyring("coalition", "fr", "de", "jp")
	name := func(i int) string { return fmt.Sprintf("k%d", i%12) }
	for i := range 12 {
		w.CreateKey("coalition", name(i), kms.Encrypt)
	}
	for i := range 600 {
		action := []kms.Action{kms.ActionSuspend, kms.ActionResume}[i/12%2]
		w.Carry(action, target(name(i)), nil)
	}
	s := w.State()
	for what, f := range map[string]func() int{
		"page of 100": func() int { l, _ := s.ProposalsBy(state.ProposalQuery{Limit: 100}); return len(l) },
		"on a key":    func() int { return len(s.ProposalsOn(target("k7"))) },
		"all":         func() int { return len(s.Proposals()) },
	} {
		b.Run(what, func(b *testing.B) {
			for b.Loop() {
				if f() < 50 {
					b.Fatal("they are not there")
				}
			}
		})
	}
}
