package approval

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	"github.com/conclave-kms/conclave/kms"
)

func carried(t testing.TB) Carried {
	t.Helper()
	p := sampleProposal(kms.ActionRotate)
	c := Carry(p.Cluster, p.Marshal(), []Custodian{
		{ID: "fr-2", Site: "fr", Credentials: []Credential{{ID: "SHA256:b"}}},
		{ID: "de-1", Site: "de", Credentials: []Credential{{ID: "SHA256:a"}, {ID: "SHA256:c"}}},
		{ID: "gone", Site: "de", Revoked: true, Credentials: []Credential{{ID: "SHA256:d"}}},
	})
	id := ProposalID(c.Proposal)
	c = c.With(Statement{Proposal: id, Verdict: Reject, Custodian: "fr-2", Credential: "SHA256:b", Signature: []byte{1}})
	return c.With(Statement{Proposal: id, Verdict: Approve, Custodian: "de-1", Credential: "SHA256:a", Signature: []byte{2}})
}

func TestCarriedRoundTrip(t *testing.T) {
	c := carried(t)
	b := c.Marshal()
	got, p, err := ParseCarried(b)
	if err != nil || !bytes.Equal(got.Marshal(), b) || !bytes.Equal(p.Marshal(), c.Proposal) {
		t.Fatalf("%v", err)
	}
	if len(got.Voters) != 2 || got.Voters[0].ID != "de-1" || got.Statements[0].Custodian != "de-1" {
		t.Errorf("%+v", got.Voters)
	}
	if who, ok := got.Owner("SHA256:c"); !ok || who != "de-1" {
		t.Errorf("SHA256:c belongs to %q", who)
	}
	if _, ok := got.Owner("SHA256:d"); ok {
		t.Error("a revoked custodian's credential has an owner")
	}
	again := got.With(Statement{Proposal: ProposalID(c.Proposal), Verdict: Reject, Custodian: "de-1", Signature: []byte{3}})
	if len(again.Statements) != 2 || again.Statements[0].Verdict != Reject || got.Statements[0].Verdict != Approve {
		t.Errorf("%+v", again.Statements)
	}
}

func TestParseCarriedRefuses(t *testing.T) {
	recover := sampleProposal(kms.ActionRecover)
	recover.Action, recover.Target = kms.ActionRecover, ClusterTarget(recover.Cluster)
	for name, change := range map[string]func(*Carried){
		"format":                  func(c *Carried) { c.Format++ },
		"cluster":                 func(c *Carried) { c.Cluster = strings.ToUpper("abcdefabcdefabcdefabcdefabcdefab") },
		"proposal":                func(c *Carried) { c.Proposal = c.Proposal[1:] },
		"another proposal":        func(c *Carried) { c.Proposal = sampleProposal(kms.ActionSuspend).Marshal() },
		"a recover statement":     func(c *Carried) { c.Proposal = recover.Marshal() },
		"verdict":                 func(c *Carried) { c.Statements[0].Verdict = "abstain" },
		"order of statements":     func(c *Carried) { c.Statements[0], c.Statements[1] = c.Statements[1], c.Statements[0] },
		"two of one custodian":    func(c *Carried) { c.Statements[1] = c.Statements[0] },
		"order of the custodians": func(c *Carried) { c.Voters[0], c.Voters[1] = c.Voters[1], c.Voters[0] },
		"a custodian's name":      func(c *Carried) { c.Voters[0].ID = "De 1" },
		"a custodian's site":      func(c *Carried) { c.Voters[0].Site = "" },
	} {
		c := carried(t)
		change(&c)
		if _, _, err := ParseCarried(c.Marshal()); !errors.Is(err, kms.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, _, err := ParseCarried(make([]byte, MaxApproved+1)); !errors.Is(err, kms.TooLarge) {
		t.Errorf("too long: %v", err)
	}
	c := carried(t)
	for range MaxApprovers {
		c.Statements = append(c.Statements, c.Statements[0])
	}
	if _, _, err := ParseCarried(c.Marshal()); !errors.Is(err, kms.TooLarge) {
		t.Errorf("too many statements: %v", err)
	}
}

func FuzzParseCarried(f *testing.F) {
	f.Add(carried(f).Marshal())
	f.Fuzz(func(t *testing.T, b []byte) {
		c, p, err := ParseCarried(b)
		if err == nil && (!bytes.Equal(c.Marshal(), b) || !bytes.Equal(p.Marshal(), c.Proposal)) {
			t.Error("what was decoded is not what is encoded")
		}
	})
}
