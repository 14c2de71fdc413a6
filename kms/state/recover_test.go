package state_test

import (
	"bytes"
	"errors"
	"slices"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// fullyRestored takes a snapshot and restores it with every statement verified.
func fullyRestored(t *testing.T, s *state.State) *state.State {
	t.Helper()
	var b bytes.Buffer
	if err := s.Snapshot(&b); err != nil {
		t.Fatal(err)
	}
	back, err := state.Restore(&b, nil)
	if err != nil {
		t.Fatal(err)
	}
	if back.Hash() != s.Hash() || back.Lineage() != s.Lineage() || back.Epoch() != s.Epoch() {
		t.Fatal("the restored state is another")
	}
	return back
}

// TestRecover goes from a rich state to another epoch: it goes on there, what was
// signed in the old history is nothing in it, and it is verified from the genesis on.
func TestRecover(t *testing.T) {
	w := rich(t)
	old := w.State()
	w.Propose(kms.ActionSuspend, "key/europe/seal", nil)
	lost := w.State()
	if len(lost.ProposalsOpen()) < 2 {
		t.Fatal("too little is open")
	}
	w.Advance(time.Hour)
	w.SetState(lost)
	approved := w.Recover(lost, "node-fr-1", "node-jp-1")
	s := w.State()
	switch r, ok := s.Recovered(); {
	case !ok || s.Epoch() != 1 || r.ID() != approval.ApprovedID(approved) || s.Lineage() == lost.Lineage() || s.Lineage() != r.Lineage(s.Cluster()):
		t.Fatalf("epoch %d, lineage %s, %v", s.Epoch(), s.Lineage(), r)
	case s.Index() != lost.Index()+1 || s.LogSize() != lost.LogSize()+1 || s.Clock() != w.Now():
		t.Errorf("index %d after %d, log %d after %d, clock %d at %d", s.Index(), lost.Index(), s.LogSize(), lost.LogSize(), s.Clock(), w.Now())
	}
	for _, m := range s.Members() {
		if m.Voter != (m.ID == "node-fr-1" || m.ID == "node-jp-1") {
			t.Errorf("%s votes: %v", m.ID, m.Voter)
		}
	}
	if l := s.ProposalsOpen(); len(l) > 0 {
		t.Errorf("%d proposals are still open, the first %s", len(l), l[0].ID)
	}
	if err := s.Extends(lost); err != nil {
		t.Error(err)
	}
	if err := old.Extends(s); err == nil {
		t.Error("the old history extends the new one")
	}
	fullyRestored(t, s)

	// The old history is nothing here: neither its commands nor its proposals.
	e := w.Envelope("node-fr-1", state.Tick{})
	e.Cluster = lost.Cluster()
	if r := w.Apply(w.Sign(e)); r.Kind != kms.Invalid {
		t.Errorf("a command of the old history: %v", r.Err())
	}
	p := w.Proposal(kms.ActionSuspend, "key/europe/seal", nil)
	p.Cluster = lost.Lineage()
	w.Refuse(kms.Invalid, "node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))

	// It goes on, and through a second recovery.
	w.Carry(kms.ActionPolicy, "policy/standard", approval.PolicyParams{Rules: policyRules(s, "standard")})
	w.Advance(time.Minute)
	fullyRestored(t, w.State())
	w.Recover(w.State())
	if w.State().Epoch() != 2 || len(w.State().Recoveries()) != 2 {
		t.Errorf("epoch %d", w.State().Epoch())
	}
	w.Advance(time.Minute)
	fullyRestored(t, w.State())
}

func policyRules(s *state.State, name string) []approval.Rule {
	p, _ := s.Policy(name)
	rules := slices.Clone(p.Rules)
	rules[0].Lifetime++
	return rules
}

// TestRecoveredClock: the survivors of one site have a clock of their own.
func TestRecoveredClock(t *testing.T) {
	w := statetest.New(t, statetest.Options{Sites: []string{"de", "fr", "jp"}})
	w.Advance(time.Hour)
	w.Recover(w.State(), "node-fr-1")
	before := w.State().Clock()
	w.Do("node-fr-1", state.Tick{}, statetest.At(before+60_000))
	if got := w.State().Clock(); got != before+60_000 {
		t.Errorf("the clock is %d, want %d", got, before+60_000)
	}
	w.Do("node-de-1", state.Tick{}, statetest.At(before+600_000))
	if got := w.State().Clock(); got != before+60_000 {
		t.Errorf("a site without a vote has moved the clock to %d", got)
	}
	fullyRestored(t, w.State())
}

// TestRecoverRefuses changes one thing at a time of what would be accepted.
func TestRecoverRefuses(t *testing.T) {
	w := rich(t)
	s := w.State()
	other := statetest.New(t, statetest.Options{})
	params := func(p *approval.Proposal, change func(*approval.RecoverParams)) {
		v, err := p.RecoverParams()
		if err != nil {
			t.Fatal(err)
		}
		change(&v)
		p.Parameters = canon.Marshal(v)
	}
	two := []string{"fr-1", "de-1"}
	for name, c := range map[string]struct {
		kind       kms.Kind
		custodians []string
		change     func(p *approval.Proposal)
	}{
		"nobody approves":        {kms.NeedsApproval, nil, nil},
		"one custodian":          {kms.NeedsApproval, two[:1], nil},
		"custodians of one site": {kms.NeedsApproval, []string{"fr-1", "fr-2"}, nil},
		"another state": {kms.Conflict, two, func(p *approval.Proposal) {
			params(p, func(v *approval.RecoverParams) { v.State = bytes.Repeat([]byte{1}, 32) })
		}},
		"another index":    {kms.Conflict, two, func(p *approval.Proposal) { params(p, func(v *approval.RecoverParams) { v.Index++ }) }},
		"another log root": {kms.Conflict, two, func(p *approval.Proposal) { params(p, func(v *approval.RecoverParams) { v.LogRoot[0]++ }) }},
		"another cluster": {kms.Conflict, two, func(p *approval.Proposal) {
			params(p, func(v *approval.RecoverParams) { v.Cluster = other.State().Cluster() })
		}},
		"another history": {kms.Conflict, two, func(p *approval.Proposal) {
			p.Cluster = other.State().Cluster()
			p.Target = approval.ClusterTarget(p.Cluster)
		}},
		"the same epoch": {kms.Invalid, two, func(p *approval.Proposal) { params(p, func(v *approval.RecoverParams) { v.Epoch = 0 }) }},
		"a stranger votes": {kms.Conflict, two, func(p *approval.Proposal) {
			params(p, func(v *approval.RecoverParams) { v.Voters = []string{"stranger"} })
		}},
		"nobody votes":      {kms.Invalid, two, func(p *approval.Proposal) { params(p, func(v *approval.RecoverParams) { v.Voters = nil }) }},
		"before the backup": {kms.Conflict, two, func(p *approval.Proposal) { p.Created = s.Clock() - 1 }},
		"too long a life":   {kms.Invalid, two, func(p *approval.Proposal) { p.Expires = p.Created + approval.MaxLifetime }},
		"another policy":    {kms.Conflict, two, func(p *approval.Proposal) { p.PolicyRevision++ }},
		"another action": {kms.Invalid, two, func(p *approval.Proposal) {
			p.Action, p.Target, p.Parameters = kms.ActionSuspend, approval.KeyTarget("europe", "seal"), nil
		}},
	} {
		t.Run(name, func(t *testing.T) {
			p := w.RecoverStatement(s)
			if c.change != nil {
				c.change(&p)
			}
			if next, err := s.Recover(w.ApproveRecovery(p, c.custodians...)); !errors.Is(err, c.kind) || next != nil {
				t.Errorf("%v, want %v", err, c.kind)
			}
		})
	}
	approved := w.ApproveRecovery(w.RecoverStatement(s), two...)
	if _, err := s.Recover(approved); err != nil {
		t.Fatal(err)
	}
	for i := range approved {
		b := bytes.Clone(approved)
		b[i] ^= 1
		if _, err := s.Recover(b); err == nil {
			t.Fatalf("accepted with byte %d changed", i)
		}
	}
	if _, err := other.State().Recover(approved); !errors.Is(err, kms.Conflict) {
		t.Errorf("for another cluster's state: %v", err)
	}
	// A revoked custodian does not count, in the state that is recovered.
	c, _ := s.Custodian("de-1")
	c.Revoked, c.Revision = true, 0
	w.Carry(kms.ActionCustodian, "custodian/de-1", approval.CustodianParams{Custodian: c})
	if _, err := w.State().Recover(w.ApproveRecovery(w.RecoverStatement(w.State()), two...)); !errors.Is(err, kms.Denied) {
		t.Errorf("by a revoked custodian: %v", err)
	}
}

// TestRecoverIsNoCommand: nobody begins an epoch through the log.
func TestRecoverIsNoCommand(t *testing.T) {
	w := statetest.New(t, statetest.Options{Sites: []string{"de", "fr"}})
	p := w.RecoverStatement(w.State())
	w.Refuse(kms.Invalid, "node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
}

// TestSuperseded: a node of the old history believes its own custodians, nobody else.
func TestSuperseded(t *testing.T) {
	w := statetest.New(t, statetest.Options{Sites: []string{"de", "fr", "jp"}})
	old := w.State()
	approved := w.Recover(old, "node-fr-1")
	if epoch, err := old.Superseded(approved); err != nil || epoch != 1 {
		t.Errorf("%d, %v", epoch, err)
	}
	if _, err := w.State().Superseded(approved); !errors.Is(err, kms.Conflict) {
		t.Errorf("in its own epoch: %v", err)
	}
	alone := w.ApproveRecovery(w.RecoverStatement(old), "fr-1", "fr-2")
	if _, err := old.Superseded(alone); !errors.Is(err, kms.NeedsApproval) {
		t.Errorf("by one site: %v", err)
	}
}

func TestKeepSeed(t *testing.T) {
	w := statetest.New(t, statetest.Options{Sites: []string{"de", "fr"}})
	n, _ := w.State().Node("node-fr-1")
	seed := state.KeepSeed{Root: 1, Suite: n.Suite, Wrapped: []byte("wrapped by the device")}
	w.Do("node-fr-1", seed)
	w.Refuse(kms.Exists, "node-fr-1", seed)
	w.Refuse(kms.Conflict, "node-fr-1", state.KeepSeed{Root: 2, Suite: n.Suite, Wrapped: seed.Wrapped})
	w.Refuse(kms.Invalid, "node-fr-1", state.KeepSeed{Root: 1, Suite: n.Suite})
	w.Refuse(kms.Invalid, "node-fr-1", state.KeepSeed{Root: 1, Suite: n.Suite, Wrapped: make([]byte, state.MaxSeed+1)})
	if got, ok := w.State().Seed("node-fr-1"); !ok || !bytes.Equal(got.Wrapped, seed.Wrapped) {
		t.Errorf("%v", got)
	}
	fullyRestored(t, w.State())
	w.Rekey("node-fr-1")
	if _, ok := w.State().Seed("node-fr-1"); ok {
		t.Error("the seed of a root that was replaced is kept")
	}
	fullyRestored(t, w.State())
}

func FuzzParseApproved(f *testing.F) {
	w := statetest.New(f, statetest.Options{Sites: []string{"de", "fr"}})
	f.Add(w.ApproveRecovery(w.RecoverStatement(w.State()), "fr-1", "de-1"))
	f.Add([]byte{0xa0})
	f.Fuzz(func(t *testing.T, b []byte) {
		a, _, err := approval.ParseApproved(b)
		if err == nil && !bytes.Equal(a.Marshal(), b) {
			t.Error("does not round-trip")
		}
	})
}
