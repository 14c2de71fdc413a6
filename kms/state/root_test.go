package state_test

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

const fr = "node-fr-1"

// restoreBoth reads a snapshot of the state with and without trust.
func restoreBoth(t *testing.T, s *state.State) {
	t.Helper()
	b := snapshot(t, s)
	for name, trusted := range map[string]func([32]byte) bool{"trusted": yes, "untrusted": no} {
		got, err := state.Restore(bytes.NewReader(b), trusted)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if got.Hash() != s.Hash() {
			t.Errorf("%s: the restored state differs", name)
		}
	}
}

// TestRekey replaces a node's root: what it has is resealed, it adopts, and the
// old root is nothing any more.
func TestRekey(t *testing.T) {
	w := vault(t)
	w.CreateKeyring("europe", "fr", "de")
	w.CreateKeyring("home", "fr")
	w.CreateKey("europe", "mail", kms.Encrypt)
	w.GiveReceipts()
	old := w.Node(fr)
	if s := w.State(); s.NextRoot(fr) != 2 || len(s.Unsealed(fr)) != 0 || len(s.Replacements()) != 0 || s.NextRoot("none") != 1 {
		t.Error("a replacement before there is one")
	}
	id := w.Propose(kms.ActionNode, approval.NodeTarget(fr), w.NodeParams(fr, w.NewRoot(fr), false))
	w.Approve(id, "de-1", "jp-1")
	progress(t, w, id, "open") // the node's own site must agree
	w.Approve(id, "fr-2")
	r := w.Execute(id)
	if len(r.Events) != 2 || r.Events[1].Type != state.EventNodeReplacing || r.Events[1].Node != fr {
		t.Errorf("events %+v", r.Events)
	}
	s := w.State()
	next, ok := s.Replacement(fr)
	if !ok || next.Root != 2 || next.Proposal != id || next.Index != s.Index() || s.NextRoot(fr) != 3 {
		t.Errorf("replacement %+v", next)
	}
	want := []state.Pending{
		{Keyring: "europe", Version: 1}, {Keyring: "home", Version: 1},
		{Keyring: "vault", Key: "code", Version: 1}, {Keyring: "vault", Key: "mail", Version: 1}, {Keyring: "vault", Key: "seal", Version: 1},
	}
	if got := s.Unsealed(fr); !slices.Equal(got, want) {
		t.Errorf("to be resealed: %v", got)
	}
	// Life goes on under the present root, and what comes now has to be resealed too.
	w.Rotate("vault", "seal")
	w.CreateKeyring("late", "fr", "de")
	if got := w.State().Unsealed(fr); len(got) != 7 {
		t.Errorf("to be resealed: %v", got)
	}
	refused(t, w, kms.Conflict, w.Command(fr, w.AdoptCommand(fr)))
	w.Reseal(fr)
	if got := w.State().Unsealed(fr); len(got) != 0 {
		t.Errorf("still to be resealed: %v", got)
	}
	restoreBoth(t, w.State())
	tick := old.SignCommand(t, w.Envelope(fr, state.Tick{}, statetest.At(w.Now()+1000)).Marshal())
	if r := w.Apply(tick); r.Err() != nil {
		t.Fatal(r.Err())
	}
	late := old.SignCommand(t, w.Envelope(fr, state.Tick{}, statetest.At(w.Now()+2000)).Marshal())
	again := w.AdoptCommand(fr)
	r = w.Do(fr, again)
	if len(r.Events) != 1 || r.Events[0].Type != state.EventNodeReplaced {
		t.Errorf("events %+v", r.Events)
	}
	refused(t, w, kms.BadSignature, late)
	refused(t, w, kms.Conflict, w.Command(fr, again))
	adopted(t, w, old)
	restoreBoth(t, w.State()) // its last tick is from the time of the old root
	w.Rotate("vault", "mail")
	w.Rotate("europe", "mail")
	w.Rekey(fr)
	w.Rekey("node-de-1")
	if n, _ := w.State().Node(fr); n.Root != 3 || n.Revision != 5 || len(w.State().FormerRoots(fr)) != 2 {
		t.Errorf("after another: %+v", n)
	}
	restoreBoth(t, w.State())
}

// adopted checks the state after the first rekey of fr.
func adopted(t *testing.T, w *statetest.World, old *statetest.Node) {
	t.Helper()
	s := w.State()
	n, _ := s.Node(fr)
	if n.Root != 2 || n.Revision != 3 || bytes.Equal(n.Signing, old.Record.Signing) || bytes.Equal(n.Agreement, old.Record.Agreement) || n.Address != old.Record.Address {
		t.Errorf("node %+v", n)
	}
	if _, pending := s.Replacement(fr); pending || len(s.Unsealed(fr)) != 0 || s.NextRoot(fr) != 3 {
		t.Error("a replacement is left")
	}
	if f := s.FormerRoots(fr); len(f) != 1 || f[0].Root != 1 || !bytes.Equal(f[0].Signing, old.Record.Signing) || f[0].Until != s.Index()-2 {
		t.Errorf("former roots %+v", f)
	}
	check := func(what string, copies []state.SealedCopy) {
		for _, c := range copies {
			if want := uint32(1); c.Node == fr && c.Root != 2 || c.Node != fr && c.Root != want {
				t.Errorf("%s has a copy for root %d of %s", what, c.Root, c.Node)
			}
		}
	}
	for _, k := range s.Keyrings() {
		for _, kek := range s.KEKs(k.Name) {
			check(k.Name, kek.Copies)
		}
	}
	for _, name := range []string{"mail", "code", "seal"} {
		for _, v := range s.Versions("vault", name) {
			check(name, v.Copies)
			if len(v.Copies) != 2 {
				t.Errorf("%d copies of %s", len(v.Copies), name)
			}
		}
	}
}

// TestRekeyRefused refuses proposals for roots that must not be.
func TestRekeyRefused(t *testing.T) {
	w := vault(t)
	w.Rekey("node-de-1")
	pending := w.Replace("node-jp-1", false)
	fresh := w.NewRoot(fr)
	good := w.NodeParams(fr, fresh, false)
	open := func(change func(*approval.Proposal, *approval.NodeParams)) []byte {
		params := good
		p := w.Proposal(kms.ActionNode, approval.NodeTarget(fr), nil)
		change(&p, &params)
		p.Parameters = canon.Marshal(params)
		return w.Command(fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	}
	root := func(n *statetest.Node) func(*approval.Proposal, *approval.NodeParams) {
		return func(_ *approval.Proposal, c *approval.NodeParams) { *c = w.NodeParams(fr, n, false) }
	}
	mixed := func(agreement, signing *statetest.Node) func(*approval.Proposal, *approval.NodeParams) {
		n := *signing
		n.Record.Suite, n.Record.Agreement = agreement.Record.Suite, agreement.Record.Agreement
		return root(&n)
	}
	former := w.State().FormerRoots("node-de-1")[0]
	gone := w.RootWith("node-de-1", former.Signing)
	deaf := *w.NewRoot(fr)
	deaf.Record.ImportKind, deaf.Record.Import = "", nil
	for name, c := range map[string]struct {
		kind   kms.Kind
		change func(*approval.Proposal, *approval.NodeParams)
	}{
		"no possession":        {kms.Invalid, func(_ *approval.Proposal, c *approval.NodeParams) { c.Possession = nil }},
		"possession":           {kms.BadSignature, func(_ *approval.Proposal, c *approval.NodeParams) { c.Possession = bytes.Repeat([]byte{1}, 64) }},
		"another device text":  {kms.BadSignature, func(_ *approval.Proposal, c *approval.NodeParams) { c.Root.Device = "better" }},
		"for another node":     {kms.BadSignature, func(_ *approval.Proposal, c *approval.NodeParams) { *c = w.NodeParams("node-de-1", fresh, false) }},
		"unknown node":         {kms.NotFound, func(p *approval.Proposal, _ *approval.NodeParams) { p.Target = "node/none" }},
		"revision":             {kms.Conflict, func(p *approval.Proposal, _ *approval.NodeParams) { p.Revision++ }},
		"policy":               {kms.Invalid, func(p *approval.Proposal, _ *approval.NodeParams) { p.Policy = "standard" }},
		"its own root":         {kms.Conflict, root(w.Node(fr))},
		"another's root":       {kms.Conflict, root(w.Node("node-jp-1"))},
		"another's next root":  {kms.Conflict, root(pending)},
		"another's agreement":  {kms.Conflict, mixed(w.Node("node-jp-1"), fresh)},
		"a former root":        {kms.Conflict, root(gone)},
		"a former signing key": {kms.Conflict, mixed(fresh, gone)},
		"takes no keys":        {kms.Conflict, root(&deaf)},
		"agreement key":        {kms.Invalid, func(_ *approval.Proposal, c *approval.NodeParams) { c.Root.Agreement = c.Root.Agreement[1:] }},
		"signing key":          {kms.Invalid, func(_ *approval.Proposal, c *approval.NodeParams) { c.Root.Signing = make([]byte, 65) }},
		"signing suite":        {kms.Invalid, func(_ *approval.Proposal, c *approval.NodeParams) { c.Root.SigningSuite = 1 }},
		"import without kind":  {kms.Invalid, func(_ *approval.Proposal, c *approval.NodeParams) { c.Root.ImportKind = "" }},
		"attestation": {kms.Invalid, func(_ *approval.Proposal, c *approval.NodeParams) {
			c.Root.Attestation = make([]byte, approval.MaxAttestation+1)
		}},
	} {
		t.Run(name, func(t *testing.T) { refused(t, w, c.kind, open(c.change)) })
	}
	w.Carry(kms.ActionNode, approval.NodeTarget(fr), good)
}

func TestResealRefused(t *testing.T) {
	w := vault(t)
	w.CreateKeyring("europe", "fr", "de")
	w.CreateKey("europe", "mail", kms.Encrypt)
	w.CreateKeyring("asia", "jp")
	kek := state.Pending{Keyring: "europe", Version: 1}
	c := w.ResealCommand(fr, kek)
	c.Root = 2
	refused(t, w, kms.Conflict, w.Command("node-de-1", c)) // no replacement is pending
	w.Replace(fr, false)
	send := func(node string, p state.Pending, change func(*state.Reseal), opts ...statetest.Option) []byte {
		c := w.ResealCommand(fr, p)
		change(&c)
		return w.Command(node, c, opts...)
	}
	same := func(*state.Reseal) {}
	refused(t, w, kms.NotResident, send("node-jp-1", kek, same))
	refused(t, w, kms.Denied, send(fr, kek, same)) // another node is there for it
	refused(t, w, kms.Conflict, send("node-de-1", kek, func(c *state.Reseal) { c.Root = 3 }))
	refused(t, w, kms.Conflict, send("node-de-1", kek, func(c *state.Reseal) { c.Node = "node-jp-1" }))
	refused(t, w, kms.NotResident, send("node-jp-1", state.Pending{Keyring: "asia", Version: 1}, same)) // fr has no copy
	refused(t, w, kms.NotFound, send("node-de-1", state.Pending{Keyring: "none", Version: 1}, same))
	refused(t, w, kms.NotFound, send("node-de-1", state.Pending{Keyring: "europe", Version: 2}, same))
	refused(t, w, kms.NotFound, send("node-de-1", state.Pending{Keyring: "vault", Version: 1}, same)) // it has no KEK
	refused(t, w, kms.NotFound, send("node-de-1", state.Pending{Keyring: "vault", Key: "mail", Version: 2}, same))
	refused(t, w, kms.Invalid, send("node-de-1", state.Pending{Keyring: "europe", Key: "mail", Version: 1}, same)) // under the KEK
	refused(t, w, kms.Invalid, send("node-de-1", kek, func(c *state.Reseal) { c.Sealed = nil }))
	refused(t, w, kms.Invalid, send("node-de-1", kek, func(c *state.Reseal) { c.Version = 0 }))
	refused(t, w, kms.Invalid, send("node-de-1", kek, func(c *state.Reseal) { c.Root = 0 }))
	refused(t, w, kms.Invalid, send("node-de-1", kek, same, statetest.As(w.Operator("de"))))
	refused(t, w, kms.Invalid, send("node-de-1", kek, same, statetest.Expect(1)))
	w.Do("node-de-1", w.ResealCommand(fr, kek))
	refused(t, w, kms.Exists, send("node-de-1", kek, same))
}

// TestAdoptRefused: only the next signing key adopts, and nothing else is signed
// with it before.
func TestAdoptRefused(t *testing.T) {
	w := vault(t)
	next := w.Replace(fr, false)
	w.Reseal(fr)
	old := w.Node(fr)
	adopt := w.Envelope(fr, w.AdoptCommand(fr))
	refused(t, w, kms.BadSignature, old.SignCommand(t, adopt.Marshal()))
	refused(t, w, kms.BadSignature, next.SignCommand(t, w.Envelope(fr, state.Tick{}).Marshal()))
	send := func(node string, change func(*state.AdoptRoot)) []byte {
		c := w.AdoptCommand(fr)
		change(&c)
		return w.Command(node, c)
	}
	refused(t, w, kms.Conflict, send(fr, func(c *state.AdoptRoot) { c.Root = 3 }))
	refused(t, w, kms.Invalid, send(fr, func(c *state.AdoptRoot) { c.Root = 0 }))
	refused(t, w, kms.Invalid, send(fr, func(c *state.AdoptRoot) { c.Copies = nil }))
	refused(t, w, kms.Invalid, send(fr, func(c *state.AdoptRoot) { c.Copies = c.Copies[1:] }))
	refused(t, w, kms.Conflict, send(fr, func(c *state.AdoptRoot) { c.Copies[0] ^= 1 }))
	refused(t, w, kms.Invalid, w.Command(fr, w.AdoptCommand(fr), statetest.As(w.Operator("fr"))))
	refused(t, w, kms.Conflict, send("node-de-1", func(*state.AdoptRoot) {}))
	w.Do(fr, w.AdoptCommand(fr))
}

// TestReplacedReplacement: a second proposal takes the place of the first one's
// root, and nothing sealed to that is left or comes late.
func TestReplacedReplacement(t *testing.T) {
	w := vault(t)
	w.CreateKeyring("europe", "fr", "de")
	w.Replace(fr, false)
	late := w.Command("node-de-1", w.ResealCommand(fr, state.Pending{Keyring: "europe", Version: 1}))
	w.Do("node-de-1", w.ResealCommand(fr, state.Pending{Keyring: "vault", Key: "mail", Version: 1}))
	early := w.Command(fr, w.AdoptCommand(fr))
	other := w.Propose(kms.ActionNode, approval.NodeTarget(fr), w.NodeParams(fr, w.NewRoot(fr), false))
	w.ApproveAll(other)
	restoreBoth(t, w.State())
	w.Execute(other)
	next, _ := w.State().Replacement(fr)
	if next.Root != 3 || next.Proposal != other || w.State().Resealed(fr) != 0 {
		t.Errorf("replacement %+v, %d statements behind copies", next, w.State().Resealed(fr))
	}
	refused(t, w, kms.Conflict, late)
	refused(t, w, kms.BadSignature, early)
	restoreBoth(t, w.State())
	w.Reseal(fr)
	w.Do(fr, w.AdoptCommand(fr))
	if n, _ := w.State().Node(fr); n.Root != 3 {
		t.Errorf("root number %d", n.Root)
	}
	restoreBoth(t, w.State())
}

// TestRootChangeVoids: a proposal about a node's root ends when the node changes.
func TestRootChangeVoids(t *testing.T) {
	w := vault(t)
	w.Replace(fr, false)
	stale := w.Propose(kms.ActionNode, approval.NodeTarget(fr), w.NodeParams(fr, w.NewRoot(fr), false))
	w.ApproveAll(stale)
	w.Reseal(fr)
	w.Do(fr, w.AdoptCommand(fr))
	progress(t, w, stale, "void")
	refused(t, w, kms.Conflict, w.Command("node-de-1", state.Execute{Proposal: stale}, statetest.Expect(2)))
}

// TestLeave adopts without the key versions that cannot be moved, never without a
// KEK that can.
func TestLeave(t *testing.T) {
	w := vault(t)
	w.CreateKeyring("europe", "fr", "de")
	w.GiveReceipts()
	w.Replace(fr, true)
	w.Do("node-de-1", w.ResealCommand(fr, state.Pending{Keyring: "vault", Key: "mail", Version: 1}))
	refused(t, w, kms.Conflict, w.Command(fr, w.AdoptCommand(fr)))
	w.Do("node-de-1", w.ResealCommand(fr, state.Pending{Keyring: "europe", Version: 1}))
	w.Do(fr, w.AdoptCommand(fr))
	for name, copies := range map[string]int{"mail": 2, "code": 1, "seal": 1} {
		if v, _ := w.State().Version("vault", name, 1); len(v.Copies) != copies {
			t.Errorf("%s has %d copies, want %d", name, len(v.Copies), copies)
		}
	}
	restoreBoth(t, w.State())
	w.Replace(fr, false)
	if got := w.State().Unsealed(fr); len(got) != 2 { // what it has
		t.Errorf("to be resealed: %v", got)
	}
	w.Reseal(fr)
	w.Do(fr, w.AdoptCommand(fr))
	w.Rotate("vault", "code") // from the next version on it has everything again
	restoreBoth(t, w.State())
}

// TestLeftWithoutReceipt: a node that was left without a copy owes no receipt, and
// its signature of one is not taken.
func TestLeftWithoutReceipt(t *testing.T) {
	w := vault(t)
	for _, name := range []string{"mail", "seal"} {
		id := w.Propose(kms.ActionRotate, vaultKey(name), nil)
		w.ApproveAll(id)
		w.Commit(id)
	}
	w.Replace(fr, true)
	if got := w.State().Pending(fr); len(got) != 2 {
		t.Errorf("pending: %v", got)
	}
	receipt := w.ReceiptCommand(fr, "vault", "seal", 2)
	w.Do(fr, w.AdoptCommand(fr))
	if got := w.State().Pending(fr); len(got) != 0 {
		t.Errorf("pending without copies: %v", got)
	}
	refused(t, w, kms.NotFound, w.Command(fr, receipt))
	w.GiveReceipts()
	for _, name := range []string{"mail", "seal"} {
		if k, _ := w.State().Key("vault", name); k.Primary != 1 {
			t.Errorf("%s: version %d is primary without the receipt of a node", name, k.Primary)
		}
		w.Rotate("vault", name) // the next version has a copy for everybody
		if k, _ := w.State().Key("vault", name); k.Primary != 3 {
			t.Errorf("%s: version %d is primary", name, k.Primary)
		}
	}
	restoreBoth(t, w.State())
}

// TestLeaveSole: a keyring at a node alone whose device is dead is lost; the node
// goes on without it if the custodians say so.
func TestLeaveSole(t *testing.T) {
	w := vault(t)
	w.CreateKeyring("home", "fr")
	w.CreateKeyring("europe", "fr", "de")
	w.Replace(fr, false)
	refused(t, w, kms.Conflict, w.Command(fr, w.AdoptCommand(fr)))
	w.Replace(fr, true)
	refused(t, w, kms.Conflict, w.Command(fr, w.AdoptCommand(fr))) // de can reseal europe
	w.Do(de, w.ResealCommand(fr, state.Pending{Keyring: "europe", Version: 1}))
	w.Do(fr, w.AdoptCommand(fr))
	if kek, _ := w.State().KEK("home", 1); len(kek.Copies) != 0 {
		t.Errorf("%d copies", len(kek.Copies))
	}
	restoreBoth(t, w.State())
	w.Rekey(fr)
}

// TestRaceWithAdoption: what was sealed to the old root is refused after the
// adoption, and can be made again.
func TestRaceWithAdoption(t *testing.T) {
	w := vault(t)
	ring := w.Command("node-de-1", w.KeyringCommand("europe", "fr", "de"), statetest.As(w.Operator("de")))
	key := w.Command("node-de-1", w.KeyCommand("vault", "late", kms.MAC), statetest.As(w.Operator("de")))
	w.Rekey(fr)
	refused(t, w, kms.Conflict, ring)
	refused(t, w, kms.Conflict, key)
	w.CreateKeyring("europe", "fr", "de")
	w.CreateKey("vault", "late", kms.MAC)
}

// TestRestoreRefusesForgedRoots alters what makes a root in untrusted snapshots:
// see also TestUntrustedRefusesAlterations.
func TestRestoreRefusesForgedRoots(t *testing.T) {
	w := vault(t)
	w.Rekey(fr)
	w.Advance(time.Minute)
	w.Replace(fr, false)
	before := w.State()
	w.Reseal(fr)
	s := w.State()
	if err := s.Extends(before); err != nil {
		t.Error(err)
	}
	if err := before.Extends(s); err == nil {
		t.Error("the state without the copies extends the one with them")
	}
	w.Do(fr, w.AdoptCommand(fr))
	if err := w.State().Extends(s); err != nil {
		t.Error(err)
	}
	if err := w.State().VerifyStatements(); err != nil {
		t.Error(err)
	}
}
