package state_test

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

const fr2 = "node-fr-2"

// populated is a cluster with keyrings of both protections, in which every node has
// announced what it knows.
func populated(t testing.TB) *statetest.World {
	w := statetest.New(t, statetest.Options{})
	w.Announce()
	w.CreateKeyring("coalition", "fr", "de", "jp")
	w.CreateKeyring("home", "fr")
	w.CreateHardwareKeyring("vault", "fr", "de")
	w.GiveReceipts()
	w.CreateKey("coalition", "mail", kms.Encrypt)
	w.CreateKey("vault", "code", kms.MAC)
	w.CreateKey("vault", "seal", kms.Sign)
	w.GiveReceipts()
	w.Advance(time.Minute)
	return w
}

func members(w *statetest.World) string {
	var l []string
	for _, m := range w.State().Members() {
		if m.Voter {
			m.ID = strings.ToUpper(m.ID)
		}
		l = append(l, m.ID)
	}
	return strings.Join(l, " ")
}

// TestJoin has a node join, adopt its first root, and vote.
func TestJoin(t *testing.T) {
	w := populated(t)
	first := w.State()
	n, params := w.JoinParams(fr2, "fr", false)
	id := w.Propose(kms.ActionNode, approval.NodeTarget(fr2), params)
	w.Approve(id, "de-1", "jp-1")
	progress(t, w, id, "open") // its own site must agree
	w.Approve(id, "fr-1")
	w.Execute(id)
	s := w.State()
	if got := members(w); got != "NODE-DE-1 NODE-FR-1 node-fr-2 NODE-JP-1" {
		t.Errorf("members %s", got)
	}
	if before, pending := s.PendingMembers(); !pending || len(before) != 3 || slices.Contains(before, state.Member{ID: fr2}) {
		t.Errorf("pending: %v, before %v", pending, before)
	}
	if node, _ := s.Node(fr2); node.Root != 0 || len(node.Signing) != 0 || s.Resident("coalition", fr2) || len(s.ResidentNodes("coalition")) != 3 || s.NextRoot(fr2) != 2 {
		t.Errorf("a joining node is resident: %+v", node)
	}
	restoreBoth(t, s)

	// One change at a time.
	_, other := w.JoinParams("node-de-2", "de", false)
	if r := w.Apply(w.Command(fr, state.OpenProposal{Proposal: w.Proposal(kms.ActionNode, "node/node-de-2", other).Marshal()}, statetest.As(w.Operator("de")))); r.Kind != kms.Conflict || !strings.Contains(r.Message, "one change at a time") {
		t.Errorf("a second change: %v", r.Err())
	}
	w.ConfirmMembers()
	if _, pending := w.State().PendingMembers(); pending {
		t.Error("still pending")
	}
	restoreBoth(t, w.State())

	// Until it has adopted its root it does nothing, and nothing is asked of it.
	w.Refuse(kms.NotFound, fr2, state.RefuseCopy{Root: 1, Keyring: "home", Version: 1, By: fr, Copy: make([]byte, 32)})
	if r := w.Apply(n.SignCommand(t, w.Envelope(fr2, state.Tick{}).Marshal())); r.Kind != kms.BadSignature {
		t.Errorf("a tick before adoption: %v", r.Err())
	}
	w.Rotate("coalition", "mail")
	if k := key(t, w.State(), "coalition", "mail"); k.Primary != 2 {
		t.Error("a rotation waits for a node without root")
	}
	want := []state.Pending{
		{Keyring: "coalition", Version: 1}, {Keyring: "home", Version: 1},
		{Keyring: "vault", Key: "code", Version: 1}, {Keyring: "vault", Key: "seal", Version: 1},
	}
	if got := w.State().Unsealed(fr2); !slices.Equal(got, want) {
		t.Errorf("unsealed %v", got)
	}
	w.Refuse(kms.Conflict, fr2, w.AdoptCommand(fr2)) // no copies yet
	w.CreateKey("vault", "late", kms.Encrypt)        // made meanwhile: for those who were there
	w.Reseal(fr2)
	restoreBoth(t, w.State())
	r := w.Do(fr2, w.AdoptCommand(fr2))
	if len(r.Events) != 1 || r.Events[0].Type != state.EventNodeJoined {
		t.Errorf("events %+v", r.Events)
	}
	s = w.State()
	if node, _ := s.Node(fr2); node.Root != 1 || !s.Resident("home", fr2) || len(s.ResidentNodes("coalition")) != 4 || node.Voter {
		t.Errorf("after adoption: %+v", node)
	}
	w.Announce()
	w.Do(fr2, state.Tick{})
	w.GiveReceipts()
	w.Rotate("coalition", "mail") // now its receipt counts
	if v, _ := w.State().Version("coalition", "mail", 3); len(v.Receipts) != 4 || v.State != kms.Active {
		t.Errorf("version 3 is %s with %d receipts", v.State, len(v.Receipts))
	}
	if p := w.State().Pending(fr2); len(p) != 0 {
		t.Errorf("receipts that nobody can give are asked of the new node: %v", p)
	}
	restoreBoth(t, w.State())

	w.Promote(fr2)
	if got := members(w); got != "NODE-DE-1 NODE-FR-1 NODE-FR-2 NODE-JP-1" {
		t.Errorf("members %s", got)
	}
	restoreBoth(t, w.State())
	for _, older := range []*state.State{first, s} {
		if err := w.State().Extends(older); err != nil {
			t.Errorf("extends: %v", err)
		}
	}
}

// joining puts the keys of other parameters into those of a join.
func joining(join, keys approval.NodeParams) approval.NodeParams {
	join.Root, join.Possession = keys.Root, keys.Possession
	return join
}

// TestJoinRefused: nothing joins that should not.
func TestJoinRefused(t *testing.T) {
	w := populated(t)
	w.Join("node-jp-2", "jp")
	w.RemoveNode("node-jp-2", false)
	_, good := w.JoinParams(fr2, "fr", false)
	other, _ := w.JoinParams("node-fr-3", "fr", false)
	gone, _ := w.State().Removal("node-jp-2")
	if gone.Node.Root != 0 || !slices.Equal(gone.Keyrings, []state.LeftKEK{{Keyring: "coalition", Version: 1}}) {
		t.Errorf("a node that never adopted a root leaves %+v", gone)
	}
	jp, _ := w.State().Node("node-jp-1")
	for name, c := range map[string]struct {
		kind   kms.Kind
		target string
		change func(*approval.NodeParams)
	}{
		"an existing name":  {kms.Exists, "node-de-1", func(*approval.NodeParams) {}},
		"existing, signed":  {kms.Exists, "node-de-1", func(c *approval.NodeParams) { *c = joining(good, w.NodeParams("node-de-1", other, false)) }},
		"a removed name":    {kms.Conflict, "node-jp-2", func(c *approval.NodeParams) { *c = joining(good, w.NodeParams("node-jp-2", other, false)) }},
		"no such site":      {kms.Conflict, fr2, func(c *approval.NodeParams) { c.Site = "xx" }},
		"no site":           {kms.Invalid, fr2, func(c *approval.NodeParams) { c.Site = "" }},
		"no address":        {kms.Invalid, fr2, func(c *approval.NodeParams) { c.Address = "" }},
		"a bad address":     {kms.Invalid, fr2, func(c *approval.NodeParams) { c.Address = "example" }},
		"a bad API":         {kms.Invalid, fr2, func(c *approval.NodeParams) { c.API = "http://example" }},
		"a taken address":   {kms.Conflict, fr2, func(c *approval.NodeParams) { c.Address = jp.Address }},
		"no proof":          {kms.Invalid, fr2, func(c *approval.NodeParams) { c.Possession = nil }},
		"another's proof":   {kms.BadSignature, fr2, func(c *approval.NodeParams) { c.Possession = slices.Repeat([]byte{1}, 64) }},
		"the proof of next": {kms.BadSignature, fr2, func(c *approval.NodeParams) { *c = joining(good, w.NodeParams("node-fr-1", other, false)) }},
		"a member's keys":   {kms.Conflict, fr2, func(c *approval.NodeParams) { *c = joining(good, w.NodeParams(fr2, w.Node(fr), false)) }},
		"an unknown change": {kms.Invalid, fr2, func(c *approval.NodeParams) { c.Change = "expel" }},
		"no change":         {kms.Invalid, fr2, func(c *approval.NodeParams) { c.Change = "" }},
		"root of a stranger": {kms.NotFound, fr2, func(c *approval.NodeParams) {
			c.Change, c.Site, c.Address, c.API = approval.NodeReplaceRoot, "", "", ""
		}},
		"promotion with a root": {kms.Invalid, fr2, func(c *approval.NodeParams) {
			c.Change, c.Site, c.Address, c.API = approval.NodePromote, "", "", ""
		}},
		"removal with an address": {kms.Invalid, fr2, func(c *approval.NodeParams) {
			*c = approval.NodeParams{Change: approval.NodeRemove, Address: c.Address}
		}},
		"promotion of nobody":    {kms.NotFound, fr2, func(c *approval.NodeParams) { *c = approval.NodeParams{Change: approval.NodePromote} }},
		"removal of nobody":      {kms.NotFound, fr2, func(c *approval.NodeParams) { *c = approval.NodeParams{Change: approval.NodeRemove} }},
		"removal of the removed": {kms.NotFound, "node-jp-2", func(c *approval.NodeParams) { *c = approval.NodeParams{Change: approval.NodeRemove} }},
	} {
		params := good
		c.change(&params)
		p := w.Proposal(kms.ActionNode, approval.NodeTarget(c.target), params)
		if r := w.Apply(w.Command(fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))); r.Kind != c.kind {
			t.Errorf("%s: got %v, want %v", name, r.Err(), c.kind)
		}
	}
	w.Carry(kms.ActionNode, approval.NodeTarget(fr2), good)
}

// TestMembersNeedAnnouncement: a program from before membership changes would judge
// the proposal otherwise, so none is taken while a node may run one.
func TestMembersNeedAnnouncement(t *testing.T) {
	w := statetest.New(t, statetest.Options{})
	for node, p := range map[string]approval.Proposal{
		"join": func() approval.Proposal {
			_, params := w.JoinParams(fr2, "fr", false)
			return w.Proposal(kms.ActionNode, approval.NodeTarget(fr2), params)
		}(),
		"site": w.Proposal(kms.ActionSite, "site/jp", approval.SiteParams{Change: approval.SiteRemove}),
	} {
		if r := w.Apply(w.Command(fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))); r.Kind != kms.Unavailable {
			t.Errorf("%s: %v", node, r.Err())
		}
	}
}

// TestRemoveSilent: a site whose nodes never say what their programs know can be removed
// all the same, node by node; until then it holds up the rest.
func TestRemoveSilent(t *testing.T) {
	w := statetest.New(t, statetest.Options{NodesPerSite: 2})
	const silent = "jp"
	for _, node := range w.NodeIDs() {
		if n, _ := w.State().Node(node); n.Site != silent {
			news, _ := w.State().News(node, state.Program("test"))
			w.Do(node, news)
		}
	}
	carry := func(target string, params approval.NodeParams) {
		t.Helper()
		id := w.Propose(kms.ActionNode, target, params)
		w.Approve(id, "fr-1", "de-1")
		if r := w.Execute(id); r.Kind != 0 {
			t.Fatal(r.Err())
		}
		if r := w.Apply(w.Command(fr, w.ConfirmCommand())); r.Kind != 0 {
			t.Fatal(r.Err())
		}
		restoreBoth(t, w.State())
	}
	_, join := w.JoinParams("node-fr-3", "fr", false)
	p := w.Proposal(kms.ActionNode, "node/node-fr-3", join)
	if r := w.Apply(w.Command(fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))); r.Kind != kms.Unavailable {
		t.Fatalf("a join while nodes say nothing: %v", r.Err())
	}
	for _, n := range w.State().NodesOf(silent) {
		carry(approval.NodeTarget(n.ID), approval.NodeParams{Change: approval.NodeRemove})
	}
	carry("node/node-fr-3", join)
}

// TestRemoveJoining: the device of a node that was to join has opened what was sealed to
// it, also if it never adopted its root; its removal asks for new KEKs.
func TestRemoveJoining(t *testing.T) {
	w := populated(t)
	w.Join(fr2, "fr")
	w.Reseal(fr2)
	w.RemoveNode(fr2, false)
	gone, _ := w.State().Removal(fr2)
	want := []state.LeftKEK{{Keyring: "coalition", Version: 1}, {Keyring: "home", Version: 1}, {Keyring: "vault"}}
	if !slices.Equal(gone.Keyrings, want) {
		t.Errorf("left: %+v", gone.Keyrings)
	}
	if by, wanted := w.State().RotationWanted("coalition"); !wanted || by != fr2 {
		t.Errorf("no rotation is asked for: %q %v", by, wanted)
	}
	restoreBoth(t, w.State())
}

// TestPromoteRefused: only a node that is there becomes a voter, and none that gives
// its site a majority.
func TestPromoteRefused(t *testing.T) {
	w := populated(t)
	promote := func(kind kms.Kind, node, says string) {
		t.Helper()
		p := w.Proposal(kms.ActionNode, approval.NodeTarget(node), approval.NodeParams{Change: approval.NodePromote})
		r := w.Apply(w.Command(fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer)))
		if r.Kind != kind || !strings.Contains(r.Message, says) {
			t.Errorf("promote %s: got %v, want %v %q", node, r.Err(), kind, says)
		}
	}
	promote(kms.Conflict, fr, "is a voter")
	w.Join(fr2, "fr")
	promote(kms.Conflict, fr2, "not yet adopted")
	w.Reseal(fr2)
	w.Do(fr2, w.AdoptCommand(fr2))
	promote(kms.Conflict, fr2, "not been heard of")
	w.Announce()
	w.Do(fr2, state.Tick{})
	w.Promote(fr2) // 2 of 4 is no majority
	w.JoinWhole("node-fr-3", "fr")
	promote(kms.Conflict, "node-fr-3", "site fr would have 3 of 5 voters, a majority (more than 2)")
	w.JoinWhole("node-de-2", "de")
	w.Promote("node-de-2")
	w.Promote("node-fr-3") // 3 of 6
	restoreBoth(t, w.State())

	// A removal may not make one either.
	p := w.Proposal(kms.ActionNode, "node/node-jp-1", approval.NodeParams{Change: approval.NodeRemove})
	if r := w.Apply(w.Command(fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))); r.Kind != kms.Conflict || !strings.Contains(r.Message, "site fr would have 3 of 5 voters") {
		t.Errorf("removal that leaves a majority: %v", r.Err())
	}
}

// TestTwoSitesTolerateMajority: with two sites an odd number of voters always gives
// one of them the majority.
func TestTwoSitesTolerateMajority(t *testing.T) {
	w := statetest.New(t, statetest.Options{Sites: []string{"de", "fr"}})
	w.Advance(time.Second)
	w.JoinWhole(fr2, "fr")
	w.Promote(fr2)
	if got := members(w); got != "NODE-DE-1 NODE-FR-1 NODE-FR-2" {
		t.Error(got)
	}
}

// TestRemove ends a membership: nothing of the node is left but its tombstone.
func TestRemove(t *testing.T) {
	w := populated(t)
	w.JoinWhole(fr2, "fr")
	w.Promote(fr2)
	w.JoinWhole("node-jp-2", "jp")
	w.Rekey(fr2)
	w.Replace(fr2, false) // pending when it goes
	w.Reseal(fr2)
	w.CreateKey("coalition", "late", kms.Encrypt)
	// A version that only the node's receipt is missing for.
	rotate := w.Propose(kms.ActionRotate, approval.KeyTarget("coalition", "mail"), nil)
	w.ApproveAll(rotate)
	w.Commit(rotate)
	for _, node := range w.NodeIDs() {
		if node != fr2 {
			w.Do(node, w.ReceiptCommand(node, "coalition", "mail", 2))
		}
	}
	tick := w.Command(fr2, state.Tick{})
	before := w.State()
	waits := w.Propose(kms.ActionNode, approval.NodeTarget(fr2), w.NodeParams(fr2, w.NewRoot(fr2), false))

	id := w.Propose(kms.ActionNode, approval.NodeTarget(fr2), approval.NodeParams{Change: approval.NodeRemove})
	w.Approve(id, "de-1", "jp-1") // without its own site
	r := w.Execute(id)
	s := w.State()
	if !slices.ContainsFunc(r.Events, func(e state.Event) bool { return e.Type == state.EventNodeRemoved && e.Node == fr2 }) {
		t.Errorf("events %+v", r.Events)
	}
	gone, ok := s.Removal(fr2)
	want := []state.LeftKEK{{Keyring: "coalition", Version: 1}, {Keyring: "home", Version: 1}, {Keyring: "vault"}}
	if !ok || !s.Removed(fr2) || gone.Proposal != id || gone.Index != s.Index() || !slices.Equal(gone.Keyrings, want) || gone.Node.Root != 2 {
		t.Errorf("tombstone %+v", gone)
	}
	if _, there := s.Node(fr2); there || s.Resident("home", fr2) || len(s.Replacements()) != 0 || s.Resealed(fr2) != 0 {
		t.Error("the node is still there")
	}
	for _, k := range s.KEKs("coalition") {
		if slices.ContainsFunc(k.Copies, func(c state.SealedCopy) bool { return c.Node == fr2 }) {
			t.Error("a copy for the removed node is left")
		}
	}
	if p, _ := s.Proposal(waits); p.Progress != state.Void {
		t.Errorf("a proposal about the removed node is %s", p.Progress)
	}
	if k := key(t, s, "coalition", "mail"); k.Primary != 2 {
		t.Error("a version waits for the receipt of a removed node")
	}
	if r := w.Apply(tick); r.Kind != kms.Denied || !strings.Contains(r.Message, "was removed") {
		t.Errorf("a command of the removed node: %v", r.Err())
	}
	restoreBoth(t, s)
	if err := s.Extends(before); err != nil {
		t.Error(err)
	}
	if err := before.Extends(s); err == nil {
		t.Error("a state from before a removal extends one after it")
	}
	w.ConfirmMembers()
	w.Advance(time.Hour)
	w.Rotate("coalition", "mail")
	restoreBoth(t, w.State())
}

// TestLastResident: a keyring does not lose its last node unless custodians say so.
func TestLastResident(t *testing.T) {
	w := populated(t)
	p := w.Proposal(kms.ActionNode, approval.NodeTarget(fr), approval.NodeParams{Change: approval.NodeRemove})
	if r := w.Apply(w.Command("node-de-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))); r.Kind != kms.Conflict || !strings.Contains(r.Message, "the last one that can open keyring home") {
		t.Fatal(r.Err())
	}
	w.RemoveNode(fr, true)
	// The clock goes on with the two sites that are left, also in a restored state.
	clock := w.State().Clock()
	w.Advance(time.Minute)
	if got := w.State().Clock(); got != clock+time.Minute.Milliseconds() {
		t.Errorf("the clock stands at %d", got-clock)
	}
	restoreBoth(t, w.State())
	// A node of the site joins again, under another name; what is lost is not waited for.
	w.JoinWhole(fr2, "fr")
	if s := w.State(); len(s.Unsealed(fr2)) != 0 || !s.Resident("coalition", fr2) {
		t.Error("the new node lacks something that nobody has")
	}
	w.Promote(fr2)
	w.Advance(time.Minute)
	restoreBoth(t, w.State())
}

// TestSoleVoter: the only voter cannot be removed.
func TestSoleVoter(t *testing.T) {
	w := statetest.New(t, statetest.Options{Sites: []string{"fr"}})
	w.JoinWhole(fr2, "fr")
	p := w.Proposal(kms.ActionNode, approval.NodeTarget(fr), approval.NodeParams{Change: approval.NodeRemove})
	if r := w.Apply(w.Command(fr, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))); r.Kind != kms.Conflict || !strings.Contains(r.Message, "the only voter") {
		t.Fatal(r.Err())
	}
}

// TestConfirmRefused: only what Raft's list must be is confirmed, once.
func TestConfirmRefused(t *testing.T) {
	w := populated(t)
	w.Refuse(kms.Conflict, fr, state.ConfirmMembers{Index: 3, Members: w.State().Members()})
	_, params := w.JoinParams(fr2, "fr", false)
	w.Carry(kms.ActionNode, approval.NodeTarget(fr2), params)
	good := w.ConfirmCommand()
	voting := slices.Clone(good.Members)
	voting[2].Voter = true
	unsorted := slices.Clone(good.Members)
	slices.Reverse(unsorted)
	for name, c := range map[string]struct {
		kind kms.Kind
		cmd  state.ConfirmMembers
	}{
		"no index":      {kms.Invalid, state.ConfirmMembers{Members: good.Members}},
		"another index": {kms.Conflict, state.ConfirmMembers{Index: good.Index - 1, Members: good.Members}},
		"one missing":   {kms.Conflict, state.ConfirmMembers{Index: good.Index, Members: good.Members[1:]}},
		"a vote more":   {kms.Conflict, state.ConfirmMembers{Index: good.Index, Members: voting}},
		"unsorted":      {kms.Invalid, state.ConfirmMembers{Index: good.Index, Members: unsorted}},
		"nobody":        {kms.Invalid, state.ConfirmMembers{Index: good.Index}},
	} {
		if r := w.Apply(w.Command(fr, c.cmd)); r.Kind != c.kind {
			t.Errorf("%s: got %v, want %v", name, r.Err(), c.kind)
		}
	}
	w.Refuse(kms.Invalid, fr, good, statetest.As(w.Operator("fr")))
	r := w.Do(fr, good)
	if len(r.Events) != 1 || r.Events[0].Type != state.EventMembersConfirmed || r.Events[0].Node != fr2 {
		t.Errorf("events %+v", r.Events)
	}
	w.Refuse(kms.Conflict, fr, good)
}

// TestMembersUntrusted alters every field of what membership adds to an untrusted
// snapshot, and takes whole records away.
func TestMembersUntrusted(t *testing.T) {
	t.Parallel()
	w := populated(t)
	w.AddSite("it", 1)
	w.Carry(kms.ActionSite, "site/it", approval.SiteParams{Change: approval.SiteCAs, CAs: [][]byte{w.CA("it").Certificate.Raw, w.CA("fr").Certificate.Raw}})
	w.JoinWhole("node-it-1", "it")
	w.Promote("node-it-1")
	w.JoinWhole(fr2, "fr")
	w.Rekey(fr2)
	w.Advance(time.Minute)
	w.RemoveNode(fr2, false)
	w.Advance(time.Minute)
	w.Join("node-de-2", "de")
	s := w.State()
	restoreBoth(t, s)
	if tried := refusesAlterations(t, s, "membership", "removed", "site", "status"); tried < 40 {
		t.Errorf("only %d kinds of field tried", tried)
	}
	records := split(t, snapshot(t, s))
	names := state.VerifiedTables()
	tried := 0
	for i, r := range records {
		switch names[r.number] {
		case "membership", "removed", "site", "status", "node", "next", "former":
			tried++
			if _, err := state.Restore(bytes.NewReader(join(slices.Delete(slices.Clone(records), i, i+1))), no); err == nil {
				t.Errorf("accepted without record %d, of table %s", i, names[r.number])
			}
		}
	}
	if tried < 15 {
		t.Errorf("only %d records tried", tried)
	}
}
