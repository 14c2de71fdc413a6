package state_test

import (
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// careful is the standard policy with a period without use before versions are retired.
func careful(period time.Duration) []approval.Policy {
	l := statetest.Policies(3)
	for i, r := range l[1].Rules {
		if r.Action == kms.ActionDeactivate || r.Action == kms.ActionDestroy {
			l[1].Rules[i].Unused = period.Milliseconds()
		}
	}
	return l
}

// watch lets time pass in which the nodes report that they used nothing, from since on.
func watch(w *statetest.World, d time.Duration, since int64, nodes ...string) {
	for ; d > 0; d -= time.Hour {
		w.Advance(time.Hour)
		for _, n := range nodes {
			w.Do(n, state.ReportUse{From: since, Until: w.Now()})
		}
	}
}

// using has a node report that it has just used a version.
func using(w *statetest.World, node string, version uint32) {
	c := w.UseCommand("europe", "mail", version, w.Now())
	w.Do(node, state.ReportUse{Used: c.Used})
}

// TestRetireUnused: a version in use, or of which nobody knows, is retired by override
// alone.
func TestRetireUnused(t *testing.T) {
	w := statetest.New(t, statetest.Options{Policies: careful(48 * time.Hour)})
	w.Announce()
	w.CreateKeyring("europe", "fr", "de")
	w.CreateKey("europe", "mail", kms.Encrypt)
	w.GiveReceipts()
	w.Rotate("europe", "mail")
	start := w.Now()
	open := func(action kms.Action, v approval.VersionParams) state.Result {
		p := w.Proposal(action, mail, v)
		return w.Apply(w.Command(fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer)))
	}
	refuse := func(why string, action kms.Action) {
		t.Helper()
		if r := open(action, approval.VersionParams{Version: 1}); r.Kind != kms.Conflict || !strings.Contains(r.Message, why) {
			t.Errorf("%s: %v: %s, want %q", action, r.Kind, r.Message, why)
		}
	}
	one := approval.VersionParams{Version: 1}
	refuse("no word of "+de+", "+fr, kms.ActionDeactivate)
	watch(w, 3*time.Hour, start, fr)
	refuse("no word of "+de, kms.ActionDeactivate)
	watch(w, 3*time.Hour, start, fr, de)
	refuse("has been watched for less than", kms.ActionDeactivate)
	using(w, de, 1)
	used := w.Now()
	watch(w, 46*time.Hour, start, fr, de)
	refuse("was used within the last", kms.ActionDeactivate)
	refuse("was used within the last", kms.ActionDestroy)
	if r := open(kms.ActionDestroy, approval.VersionParams{}); r.Kind != kms.Conflict {
		t.Errorf("the whole key: %v", r.Kind)
	}
	if r := open(kms.ActionCompromise, one); r.Kind != 0 { // that does not wait for anybody
		t.Errorf("compromise: %s", r.Message)
	}
	watch(w, 4*time.Hour, start, fr, de)
	// Approved in time, used again before it is carried out, carried out when that is over.
	id := w.Propose(kms.ActionDeactivate, mail, one)
	using(w, fr, 1)
	w.ApproveAll(id)
	w.Refuse(kms.Conflict, fr, state.Execute{Proposal: id}, statetest.Expect(key(t, w.State(), "europe", "mail").Revision))
	watch(w, 51*time.Hour, start, fr, de)
	w.Execute(id)
	if v, _ := w.State().Version("europe", "mail", 1); v.State != kms.Deactivated {
		t.Errorf("it is %s, %d ms after it was used first", v.State, w.Now()-used)
	}
	fullyRestored(t, w.State())
	// What is no longer served waits for nobody; what is in use goes by override.
	w.Propose(kms.ActionDestroy, mail, one)
	w.Rotate("europe", "mail")
	using(w, de, 2)
	two := approval.VersionParams{Version: 2}
	if r := open(kms.ActionDeactivate, two); r.Kind != kms.Conflict {
		t.Errorf("a version that was used just now: %v", r.Kind)
	}
	two.Override = true
	w.Carry(kms.ActionDeactivate, mail, two)
	if v, _ := w.State().Version("europe", "mail", 2); v.State != kms.Deactivated {
		t.Errorf("in spite of the override it is %s", v.State)
	}
	fullyRestored(t, w.State())
}

// TestRetirementIsGated: before every release knows it, a rule about use and an override
// are refused as a program refuses them that cannot parse them.
func TestRetirementIsGated(t *testing.T) {
	w := small(t)
	w.Rotate("europe", "mail")
	propose := func(action kms.Action, target string, params any) []byte {
		p := w.Proposal(action, target, params)
		return w.Command(fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	}
	policy := approval.PolicyParams{Rules: careful(time.Hour)[1].Rules}
	override := approval.VersionParams{Version: 1, Override: true}
	refused(t, w, kms.Invalid, propose(kms.ActionPolicy, "policy/standard", policy))
	refused(t, w, kms.Invalid, propose(kms.ActionDeactivate, mail, override))
	w.Announce()
	w.Carry(kms.ActionPolicy, "policy/standard", policy)
	w.Carry(kms.ActionDeactivate, mail, override)
	fullyRestored(t, w.State())
}
