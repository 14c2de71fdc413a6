package e2e

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/test/harness"
)

// forgery is a statement that must not count, and the kinds of error that it may
// be refused with.
type forgery struct {
	name      string
	statement wire.Statement
	kinds     []kms.Kind
}

// statement signs an approval by k of the bytes of p.
func statement(t *testing.T, k *harness.Custodian, p wire.Proposal) wire.Statement {
	t.Helper()
	s, err := k.Statement(approval.Approve, p)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// changed returns the proposal with other content under the same identifier: what
// a liar shows a custodian.
func changed(t *testing.T, p wire.Proposal, change func(*approval.Proposal)) wire.Proposal {
	t.Helper()
	content, err := approval.ParseProposal(p.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	change(&content)
	b := content.Marshal()
	if bytes.Equal(b, p.Bytes) {
		t.Fatal("the change changes nothing")
	}
	p.Bytes = b
	return p
}

// forgeries makes every kind of statement by which somebody could pretend that
// de-1 approves of p: p lacks the approval of a second site. other is another open
// proposal that de-1 really approves of.
func forgeries(t *testing.T, s site, p, other wire.Proposal) []forgery {
	t.Helper()
	fr1, de1 := s.custodian("fr-1"), s.custodian("de-1")
	good := statement(t, de1, p)
	with := func(change func(*wire.Statement)) wire.Statement {
		st := good
		st.Signature = bytes.Clone(good.Signature)
		change(&st)
		return st
	}
	stranger, err := pqc.GenerateHybrid(nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stranger.Destroy)
	own := statement(t, &harness.Custodian{ID: "de-1", Key: stranger}, p)
	flip := func(at int) wire.Statement {
		return with(func(st *wire.Statement) { st.Signature[(at+len(st.Signature))%len(st.Signature)] ^= 1 })
	}
	bad, denied := []kms.Kind{kms.BadSignature}, []kms.Kind{kms.Denied}
	return []forgery{
		{"forged with a key that is no custodian's", with(func(st *wire.Statement) { st.Signature = own.Signature }), bad},
		{"forged, with the forger's own credential", own, denied},
		{"forged with fr-1's key in de-1's name", with(func(st *wire.Statement) { st.Signature = statement(t, fr1, p).Signature }), bad},
		{"fr-1's own approval in de-1's name", with(func(st *wire.Statement) {
			f := statement(t, fr1, p)
			st.Signature, st.Credential = f.Signature, f.Credential
		}), denied},
		{"by a custodian who does not exist", with(func(st *wire.Statement) { st.Custodian = "de-9" }), denied},
		{"replayed from another proposal", with(func(st *wire.Statement) { st.Signature = statement(t, de1, other).Signature }), bad},
		{"with a bit flipped in the first half of the signature", flip(0), bad},
		{"with a bit flipped in the second half of the signature", flip(-1), bad},
		{"with the signature cut short", with(func(st *wire.Statement) { st.Signature = st.Signature[:len(st.Signature)-1] }), bad},
		{"signed for another reason", statement(t, de1, changed(t, p, func(c *approval.Proposal) { c.Reason = "another reason" })), bad},
		{"signed for a later expiry", statement(t, de1, changed(t, p, func(c *approval.Proposal) { c.Expires++ })), bad},
		{"signed for another target", statement(t, de1, changed(t, p, func(c *approval.Proposal) { c.Target = other.Content.Target })), bad},
		{"signed for another cluster", statement(t, de1, changed(t, p, func(c *approval.Proposal) {
			c.Cluster = strings.Repeat("5", len(c.Cluster))
		})), bad},
		{"a rejection turned into an approval", with(func(st *wire.Statement) {
			r, err := de1.Statement(approval.Reject, p)
			if err != nil {
				t.Fatal(err)
			}
			st.Signature = r.Signature
		}), bad},
	}
}

// pending makes a key and a rotation of it that both custodians of fr approve.
func (s site) pending(name string) wire.Proposal {
	s.t.Helper()
	s.key("coalition", name, kms.Encrypt, "")
	p := s.propose(kms.ActionRotate, "coalition", name)
	s.approve(s.custodian("fr-1"), p)
	p = s.approve(s.custodian("fr-2"), p)
	s.settled()
	return p
}

// unauthorised wants the proposal to stand at two approvals of one site, and its
// key at version 1, as every node sees it.
func (s site) unauthorised(p wire.Proposal) {
	s.t.Helper()
	_, name, _ := strings.Cut(p.Content.Target, "/")
	ring, key, err := kms.SplitKeyPath(name)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, n := range s.c.All() {
		cl := s.client(n.Site, "operator")
		now, err := cl.Proposal(s.t.Context(), p.ID)
		if err != nil {
			s.t.Fatal(err)
		}
		if now.Progress != "open" || now.Met || now.Approvals != 2 || now.Sites != 1 || len(now.Votes) != 2 || len(now.Missing) == 0 {
			s.t.Errorf("%s sees the proposal %s, met %v, %d approvals of %d sites, %d votes, missing %q",
				n.ID, now.Progress, now.Met, now.Approvals, now.Sites, len(now.Votes), now.Missing)
		}
		k, err := cl.Key(ring, key).Describe(s.t.Context())
		if err != nil {
			s.t.Fatal(err)
		}
		if k.Latest != 1 || k.Primary != 1 || len(k.Versions) != 1 {
			s.t.Errorf("%s has %s at version %d of %d", n.ID, name, k.Primary, k.Latest)
		}
	}
}

// TestOneNationIsNotEnough: two approvals of one nation leave a rotation
// unauthorised, whatever is submitted in the name of another; a genuine approval
// of a second nation then carries it.
func TestOneNationIsNotEnough(t *testing.T) {
	s := site{t, cluster(t)}
	name, otherName := unique("quorum"), unique("quorum-other")
	p := s.pending(name)
	s.unauthorised(p)
	s.key("coalition", otherName, kms.Encrypt, "")
	other := s.propose(kms.ActionRotate, "coalition", otherName)
	s.settled()

	for _, f := range forgeries(t, s, p, other) {
		for _, n := range s.c.All() {
			_, err := s.client(n.Site, "custodian").Vote(t.Context(), p.ID, wire.VoteRequest{Statement: f.statement})
			if !anyKind(err, f.kinds) {
				t.Errorf("an approval %s, at %s: %v (%v); wanted one of %v", f.name, n.ID, err, kms.KindOf(err), f.kinds)
			}
		}
	}
	// A statement about one proposal sent to the address of another.
	_, err := s.client("de", "custodian").Vote(t.Context(), p.ID, wire.VoteRequest{Statement: statement(t, s.custodian("de-1"), other)})
	refused(t, "a statement about another proposal", err, kms.Invalid)
	// The same custodian again counts once: verbatim it changes nothing, signed
	// anew it is refused.
	first, err := s.client("fr", "operator").Proposal(t.Context(), p.ID)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.client("jp", "custodian").Vote(t.Context(), p.ID, wire.VoteRequest{Statement: first.Votes[0].Statement}); err != nil {
		t.Errorf("fr-1's approval, repeated verbatim: %v", err)
	}
	_, err = s.client("jp", "custodian").Vote(t.Context(), p.ID, wire.VoteRequest{Statement: statement(t, s.custodian("fr-1"), p)})
	if err != nil && !errors.Is(err, kms.Exists) {
		t.Errorf("fr-1's approval, signed again: %v", err)
	}
	s.settled()
	s.unauthorised(p)

	after := s.approve(s.custodian("de-1"), p)
	if !after.Met || after.Sites != 2 {
		t.Errorf("with de-1's own approval: met %v, %d sites", after.Met, after.Sites)
	}
	for _, n := range s.c.All() {
		if _, err := s.c.Activated(t.Context(), n.Site, "coalition", name, 2); err != nil {
			t.Error(err)
		}
	}
}

func anyKind(err error, kinds []kms.Kind) bool {
	for _, k := range kinds {
		if errors.Is(err, k) {
			return true
		}
	}
	return false
}
