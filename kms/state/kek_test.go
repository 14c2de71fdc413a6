package state_test

import (
	"bytes"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// kekWorld is a cluster with a keyring of five key versions at all sites.
func kekWorld(t testing.TB) *statetest.World {
	w := statetest.New(t, statetest.Options{})
	w.Announce()
	w.CreateKeyring("ring", "fr", "de", "jp")
	w.GiveReceipts()
	for _, k := range []string{"a", "b", "c"} {
		w.CreateKey("ring", k, kms.Encrypt)
	}
	w.CreateKey("ring", "s", kms.Sign)
	w.Rotate("ring", "a")
	return w
}

// primary is a cluster in which KEK version 2 is primary and nothing is rewrapped.
func primary(t testing.TB) *statetest.World {
	w := kekWorld(t)
	w.CommitKEK(w.ProposeKEK("ring"))
	w.GiveReceipts()
	return w
}

func keyring(t testing.TB, w *statetest.World, name string) state.Keyring {
	t.Helper()
	k, ok := w.State().Keyring(name)
	if !ok {
		t.Fatalf("no keyring %s", name)
	}
	return k
}

// steady checks after each step of a story that a snapshot holds, also without trust,
// and that the state extends the one before.
type steady struct {
	t    *testing.T
	w    *statetest.World
	last *state.State
}

func (s *steady) step(what string) {
	s.t.Helper()
	now := s.w.State()
	if s.last != nil {
		if err := now.Extends(s.last); err != nil {
			s.t.Errorf("%s: %v", what, err)
		}
	}
	if err := now.VerifyStatements(); err != nil {
		s.t.Errorf("%s: %v", what, err)
	}
	restoreBoth(s.t, now)
	s.last = now
}

func under(s *state.State, ring string) map[uint32]int {
	n := map[uint32]int{}
	for _, k := range s.Keys(ring) {
		for _, v := range s.Versions(ring, k.Name) {
			if !v.State.Gone() {
				n[v.KEK]++
			}
		}
	}
	return n
}

// TestRotateKEK is the whole story, with keys created, rotated and destroyed meanwhile.
func TestRotateKEK(t *testing.T) {
	w := kekWorld(t)
	at := &steady{t: t, w: w}
	revision := keyring(t, w, "ring").Revision
	id := w.ProposeKEK("ring")
	r := w.CommitKEK(id)
	if len(r.Events) != 2 || r.Events[1].Type != state.EventKEKCommitted || r.Events[1].Version != 2 || r.Events[0].Keyring != "ring" {
		t.Errorf("events %+v", r.Events)
	}
	progress(t, w, id, "executed")
	if k := keyring(t, w, "ring"); k.KEK != 1 || k.Revision != revision+1 {
		t.Errorf("after the commit %+v", k)
	}
	at.step("commit")
	w.CreateKey("ring", "d", kms.MAC) // the old one is in use until all have shown that they can open the new one
	w.GiveReceipts()
	if k := keyring(t, w, "ring"); k.KEK != 2 || k.Revision != revision+1 {
		t.Errorf("after the receipts %+v", k)
	}
	at.step("receipts")
	w.CreateKey("ring", "e", kms.MAC)
	w.Rotate("ring", "b")
	if got := under(w.State(), "ring"); got[1] != 6 || got[2] != 2 {
		t.Errorf("under %v", got)
	}
	late := w.KeyCommand("ring", "late", kms.MAC)
	late.KEK = 1
	w.Refuse(kms.Conflict, fr, late, statetest.As(w.Operator("fr")))

	before, _ := w.State().Version("ring", "a", 1)
	b := w.Rewrap("node-jp-1", "ring", 3)
	if v, _ := w.State().Version("ring", "a", 1); v.KEK != 1 || !bytes.Equal(v.Wrapped, before.Wrapped) || v.Next == nil || v.Next.Batch != b.Index {
		t.Errorf("before the confirmations %+v", v)
	}
	at.step("rewrap")
	for i, n := range []string{"node-de-1", fr, "node-jp-1"} {
		refused(t, w, kms.Conflict, w.Command(n, state.RetireKEK{Keyring: "ring", Version: 1}))
		if got := under(w.State(), "ring"); got[2] != 2 {
			t.Errorf("after %d confirmations under %v", i, got)
		}
		w.Do(n, statetest.ConfirmRewrapCommand(b))
		at.step("confirmation of " + n)
	}
	if v, _ := w.State().Version("ring", "a", 1); v.KEK != 2 || bytes.Equal(v.Wrapped, before.Wrapped) || v.Next != nil {
		t.Errorf("after the confirmations %+v", v)
	}
	p, ok := w.State().KEKProgress("ring")
	if !ok || p.Target != 2 || p.Primary != 2 || p.Versions != 8 || p.Done != 5 || p.Rewrapped != 0 || !slices.Equal(p.Live, []uint32{1, 2}) {
		t.Errorf("progress %+v", p)
	}
	w.FinishKEK("ring")
	at.step("end")
	old, _ := w.State().KEK("ring", 1)
	if !old.Retired() || len(old.Copies) != 0 || len(old.Receipts) != 3 || w.State().Rotating("ring") {
		t.Errorf("the old one: %+v", old)
	}
	if got := under(w.State(), "ring"); got[1] != 0 || got[2] != 8 {
		t.Errorf("under %v", got)
	}
	w.CreateKey("ring", "f", kms.Encrypt)
	w.Rotate("ring", "s")
	w.Rekey(fr)
	at.step("life goes on")
	w.RotateKEK("ring")
	at.step("another")
	if n := w.State().Rewraps("ring", 2); n != 0 {
		t.Errorf("%d statements of rewraps to a retired version are left", n)
	}
	if v, _ := w.State().Version("ring", "a", 1); v.KEK != 3 || v.Made != 1 {
		t.Errorf("after another: %+v", v)
	}
}

// TestRotateKEKRefused refuses what must not become a KEK.
func TestRotateKEKRefused(t *testing.T) {
	w := kekWorld(t)
	w.CreateHardwareKeyring("vault", "fr", "de")
	w.CreateKeyring("europe", "fr", "de")
	w.GiveReceipts()
	p := w.Proposal(kms.ActionRotate, approval.KeyringTarget("vault"), nil)
	r := w.Refuse(kms.Conflict, fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	if !bytes.Contains([]byte(r.Message), []byte("rotate its keys")) {
		t.Errorf("says %q", r.Message)
	}
	p = w.Proposal(kms.ActionRotate, approval.KeyringTarget("none"), nil)
	p.Policy = "standard"
	w.Refuse(kms.NotFound, fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	p = w.Proposal(kms.ActionSuspend, approval.KeyringTarget("ring"), nil)
	w.Refuse(kms.Invalid, fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))

	open := w.Propose(kms.ActionRotate, approval.KeyringTarget("europe"), nil)
	p = w.Proposal(kms.ActionRotate, approval.KeyringTarget("europe"), nil)
	w.Refuse(kms.Exists, fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	early := w.CommitKEKCommand(open)
	w.Refuse(kms.NeedsApproval, fr, early, statetest.Expect(1))
	w.ApproveAll(open)
	w.Refuse(kms.Invalid, fr, state.Execute{Proposal: open}, statetest.Expect(1))
	w.Refuse(kms.NotResident, "node-jp-1", early, statetest.Expect(1))
	for name, c := range map[string]struct {
		kind   kms.Kind
		change func(*state.CommitKEK)
	}{
		"another keyring": {kms.Conflict, func(c *state.CommitKEK) { c.Keyring = "ring" }},
		"version":         {kms.Conflict, func(c *state.CommitKEK) { c.Version = 3 }},
		"first version":   {kms.Invalid, func(c *state.CommitKEK) { c.Version = 1 }},
		"a copy missing":  {kms.Invalid, func(c *state.CommitKEK) { c.Copies = c.Copies[:1] }},
		"a check missing": {kms.Invalid, func(c *state.CommitKEK) { c.Checks = c.Checks[1:] }},
		"another root":    {kms.Conflict, func(c *state.CommitKEK) { c.Copies[0].Root = 2 }},
		"a copy too many": {kms.Invalid, func(c *state.CommitKEK) {
			c.Copies = append(c.Copies, state.SealedCopy{Node: "node-jp-1", Root: 1, Sealed: []byte{1}})
		}},
		"no copies":          {kms.Invalid, func(c *state.CommitKEK) { c.Copies = nil }},
		"the other proposal": {kms.NotFound, func(c *state.CommitKEK) { c.Proposal = fmt.Sprintf("%032x", 7) }},
	} {
		bad := early
		bad.Copies, bad.Checks = slices.Clone(early.Copies), slices.Clone(early.Checks)
		c.change(&bad)
		if r := w.Apply(w.Command(fr, bad, statetest.Expect(1))); r.Kind != c.kind {
			t.Errorf("%s: %v %s", name, r.Kind, r.Message)
		}
	}
	w.CommitKEK(open)
	w.Refuse(kms.Conflict, fr, early, statetest.Expect(1))
	w.Refuse(kms.Conflict, fr, state.RetireKEK{Keyring: "europe", Version: 1})
	w.Refuse(kms.Conflict, fr, state.RetireKEK{Keyring: "europe", Version: 2})
	w.Refuse(kms.NotFound, fr, state.RetireKEK{Keyring: "europe", Version: 3})
	w.GiveReceipts()
	w.Refuse(kms.NotResident, "node-jp-1", state.RetireKEK{Keyring: "europe", Version: 1})
	w.Do(fr, state.RetireKEK{Keyring: "europe", Version: 1}) // nothing was under it
	w.Refuse(kms.Exists, fr, state.RetireKEK{Keyring: "europe", Version: 1})
	w.Refuse(kms.Conflict, fr, w.ReceiptCommand(fr, "europe", "", 1))
}

// TestRewrapRefused refuses batches that must not be.
func TestRewrapRefused(t *testing.T) {
	w := primary(t)
	w.CreateKey("ring", "new", kms.MAC)
	good := w.RewrapCommand("node-de-1", "ring", 4)
	for name, c := range map[string]struct {
		kind   kms.Kind
		change func(*state.Rewrap)
	}{
		"old KEK version":     {kms.Conflict, func(c *state.Rewrap) { c.KEK = 3 }},
		"first KEK version":   {kms.Invalid, func(c *state.Rewrap) { c.KEK = 1 }},
		"nothing":             {kms.Invalid, func(c *state.Rewrap) { c.Items = nil }},
		"twice":               {kms.Invalid, func(c *state.Rewrap) { c.Items = append(c.Items, c.Items[3]) }},
		"not sorted":          {kms.Invalid, func(c *state.Rewrap) { slices.Reverse(c.Items) }},
		"no such key":         {kms.NotFound, func(c *state.Rewrap) { c.Items[3].Key = "zzz" }},
		"no such version":     {kms.NotFound, func(c *state.Rewrap) { c.Items[3].Version = 9 }},
		"rewrapped by itself": {kms.Exists, func(c *state.Rewrap) { c.Items = []state.RewrapItem{{Key: "new", Version: 1, Wrapped: []byte{1}}} }},
		"no material":         {kms.Invalid, func(c *state.Rewrap) { c.Items[0].Wrapped = nil }},
		"too much":            {kms.Invalid, func(c *state.Rewrap) { c.Items[0].Wrapped = make([]byte, state.MaxWrapped+1) }},
	} {
		bad := good
		bad.Items = slices.Clone(good.Items)
		c.change(&bad)
		if r := w.Apply(w.Command("node-de-1", w.SignRewrap("node-de-1", bad))); r.Kind != c.kind {
			t.Errorf("%s: %v %s", name, r.Kind, r.Message)
		}
	}
	// The signature in it is the origin's, over these very wraps.
	w.Refuse(kms.BadSignature, fr, good)
	other := good
	other.Items = slices.Clone(good.Items)
	other.Items[0].Wrapped = []byte("something else")
	w.Refuse(kms.BadSignature, "node-de-1", other)
	other.Signature = nil
	w.Refuse(kms.Invalid, "node-de-1", other)
	w.Refuse(kms.Invalid, "node-de-1", good, statetest.As(w.Operator("de")))

	b := w.Rewrap("node-de-1", "ring", 4)
	w.Refuse(kms.Exists, "node-de-1", good)
	confirm := statetest.ConfirmRewrapCommand(b)
	for name, c := range map[string]struct {
		kind   kms.Kind
		change func(*state.ConfirmRewrap)
	}{
		"digest":      {kms.Conflict, func(c *state.ConfirmRewrap) { c.Digest = make([]byte, 32) }},
		"no digest":   {kms.Invalid, func(c *state.ConfirmRewrap) { c.Digest = nil }},
		"batch":       {kms.NotFound, func(c *state.ConfirmRewrap) { c.Batch++ }},
		"KEK version": {kms.Conflict, func(c *state.ConfirmRewrap) { c.KEK++ }},
		"keyring":     {kms.NotFound, func(c *state.ConfirmRewrap) { c.Keyring = "none" }},
	} {
		bad := confirm
		c.change(&bad)
		if r := w.Apply(w.Command(fr, bad)); r.Kind != c.kind {
			t.Errorf("confirmation with another %s: %v %s", name, r.Kind, r.Message)
		}
	}
	w.Do(fr, confirm)
	w.Refuse(kms.Exists, fr, confirm)
	w.Refuse(kms.Conflict, fr, statetest.RefuseRewrapCommand(b))
	bad := statetest.RefuseRewrapCommand(b)
	bad.By = fr
	w.Refuse(kms.Invalid, "node-jp-1", bad)
	bad = statetest.RefuseRewrapCommand(b)
	bad.Key = "new"
	w.Refuse(kms.NotFound, "node-jp-1", bad)
	w.Confirm("ring")
	w.Refuse(kms.Exists, "node-jp-1", statetest.RefuseRewrapCommand(b))
}

// TestHostileRewrap: a node rewraps garbage. The others refuse it, nothing is lost, and
// another node does it. So does a node that refuses what is good: it holds things up, by name.
func TestHostileRewrap(t *testing.T) {
	w := primary(t)
	at := &steady{t: t, w: w}
	before, _ := w.State().Version("ring", "a", 1)
	b := w.Rewrap("node-de-1", "ring", 3)
	w.Do("node-de-1", statetest.ConfirmRewrapCommand(b))
	at.step("garbage")
	r := w.Do(fr, statetest.RefuseRewrapCommand(b))
	if len(r.Events) != 1 || r.Events[0].Type != state.EventRewrapRefused || r.Events[0].Node != "node-de-1" {
		t.Errorf("events %+v", r.Events)
	}
	at.step("refusal")
	after, _ := w.State().Version("ring", "a", 1)
	if after.Next != nil || !bytes.Equal(before.Wrapped, after.Wrapped) || after.KEK != 1 || len(w.State().OpenBatches("ring")) != 0 {
		t.Errorf("after the refusal: %+v", after)
	}
	refusals := w.State().RefusedRewraps("ring", 2)
	if len(refusals) != 1 || refusals[0].By != "node-de-1" || refusals[0].Node != fr || refusals[0].Key != "a" || refusals[0].Batch != b.Index {
		t.Errorf("refusals %+v", refusals)
	}
	w.Refuse(kms.Denied, "node-de-1", w.RewrapCommand("node-de-1", "ring", 3))
	if w.State().MayRewrap("ring", "node-de-1") || !w.State().MayRewrap("ring", fr) || !w.State().MayRewrap("ring", "node-jp-1") {
		t.Error("who may rewrap")
	}
	// It lies about what fr does; jp finishes.
	b = w.Rewrap(fr, "ring", 2)
	w.Do("node-de-1", statetest.RefuseRewrapCommand(b))
	at.step("lie")
	if p, _ := w.State().KEKProgress("ring"); len(p.Refused) != 2 || p.Done != 0 {
		t.Errorf("progress %+v", p)
	}
	b = w.Rewrap("node-jp-1", "ring", state.MaxRewrap)
	w.Confirm("ring")
	w.Retire("ring")
	at.step("end")
	if w.State().Rotating("ring") || under(w.State(), "ring")[2] != 5 {
		t.Error("not finished")
	}
	if len(w.State().RefusedRewraps("ring", 2)) != 2 {
		t.Error("what was refused is forgotten while its KEK version is in use")
	}
	w.CommitKEK(w.ProposeKEK("ring"))
	w.GiveReceipts()
	w.Rewrap("node-de-1", "ring", state.MaxRewrap) // a new turn for everybody
	w.FinishKEK("ring")
	if len(w.State().RefusedRewraps("ring", 2)) != 0 {
		t.Error("refusals outlive their KEK version")
	}
	at.step("another")
}

// TestKEKOvertaken: a rotation that does not come to its end is overtaken by another:
// before its receipts are in, and in the middle of the rewraps.
func TestKEKOvertaken(t *testing.T) {
	w := kekWorld(t)
	at := &steady{t: t, w: w}
	w.CommitKEK(w.ProposeKEK("ring"))
	w.Do(fr, w.ReceiptCommand(fr, "ring", "", 2))
	w.CommitKEK(w.ProposeKEK("ring"))
	at.step("two at once")
	for _, n := range w.NodeIDs() {
		w.Do(n, w.ReceiptCommand(n, "ring", "", 3))
	}
	if k := keyring(t, w, "ring"); k.KEK != 3 {
		t.Errorf("KEK %d", k.KEK)
	}
	w.GiveReceipts() // those for version 2 change nothing any more
	if k := keyring(t, w, "ring"); k.KEK != 3 {
		t.Errorf("KEK %d after late receipts", k.KEK)
	}
	if got := w.State().Retirable("ring"); !slices.Equal(got, []uint32{2}) {
		t.Errorf("retirable: %v", got)
	}
	w.Rewrap(fr, "ring", 2)
	w.Confirm("ring")
	stale := w.Rewrap(fr, "ring", 2)
	w.Do(fr, statetest.ConfirmRewrapCommand(stale))
	w.CommitKEK(w.ProposeKEK("ring"))
	w.GiveReceipts()
	at.step("overtaken in the middle")
	w.Refuse(kms.Conflict, "node-de-1", statetest.ConfirmRewrapCommand(stale))
	if len(w.State().OpenBatches("ring")) != 0 || under(w.State(), "ring")[3] != 2 {
		t.Error("the batch is still open")
	}
	refused(t, w, kms.Conflict, w.Command(fr, state.RetireKEK{Keyring: "ring", Version: 3}))
	w.FinishKEK("ring")
	at.step("end")
	if got := under(w.State(), "ring"); got[4] != 5 || w.State().Rotating("ring") {
		t.Errorf("under %v", got)
	}
}

// TestKEKAndDestruction destroys versions before, in and after an open batch: nothing of
// their material stays, and the snapshot holds.
func TestKEKAndDestruction(t *testing.T) {
	w := primary(t)
	at := &steady{t: t, w: w}
	destroy := func(key string) string {
		id := w.Propose(kms.ActionDestroy, approval.KeyTarget("ring", key), approval.VersionParams{})
		w.ApproveAll(id)
		return id
	}
	first, second, third := destroy("b"), destroy("a"), destroy("c")
	w.Advance(8 * 24 * time.Hour)
	w.Execute(first)
	at.step("before")
	b := w.Rewrap(fr, "ring", 3)
	wrapped, _ := w.State().Version("ring", "a", 2)
	w.Execute(second)
	at.step("in a batch")
	for _, secret := range [][]byte{wrapped.Wrapped, wrapped.Next.Wrapped} {
		if bytes.Contains(snapshot(t, w.State()), secret) {
			t.Error("the material of a destroyed version is in the state")
		}
	}
	if v, _ := w.State().Version("ring", "a", 1); v.Next != nil || len(v.Wrapped) != 0 {
		t.Errorf("destroyed: %+v", v)
	}
	w.Confirm("ring")
	at.step("the rest is confirmed")
	v, _ := w.State().Version("ring", "c", 1)
	w.Execute(third)
	at.step("after")
	if bytes.Contains(snapshot(t, w.State()), v.Wrapped) || v.KEK != 2 {
		t.Error("the material of a destroyed version is in the state")
	}
	if got, ok := w.State().Batch("ring", 2, b.Index); !ok || !got.Done {
		t.Errorf("batch %+v", got)
	}
	w.FinishKEK("ring")
	at.step("end")
	w.RotateKEK("ring")
	at.step("another")
}
