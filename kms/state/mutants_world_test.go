package state_test

import (
	"context"
	"encoding/binary"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/pqc"
)

// good is a command as a member signed it.
type good struct {
	raw, envelope, signature []byte
	env                      state.Envelope
}

// siege is a state with what attackers have at hand.
type siege struct {
	w          *statetest.World
	base       *state.State
	content    [32]byte
	good       []good               // acceptable now
	past       []good               // carried out before
	foreign    []good               // of another cluster, or of a history that was given up
	votes      []approval.Statement // true ones that were never cast, on proposals that are open
	bad        []approval.Statement // true signatures that no vote may be made of
	commands   []good               // good and past
	statements []approval.Statement // votes and bad
	proposals  []state.Proposal
	suspended  []approval.Suspension // good statements of colleagues
	cosigned   state.Cosign          // a good one, in the first siege
	unfit      []approval.Suspension // truly signed, by those who may not or about what is not so
	hopeless   []state.Command       // well-formed commands that no member may send, with what they expect
	expects    []uint64
	member     map[string]*statetest.Node // present roots
	strange    []*statetest.Node          // keys that sign for no member: strangers', former and next roots', a removed node's
}

// ready puts together what mutants are drawn from.
func (g *siege) ready() *siege {
	g.commands, g.statements, g.proposals = slices.Concat(g.good, g.past), slices.Concat(g.votes, g.bad), g.base.Proposals()
	return g
}

// part returns the parts of a signed command.
func part(t testing.TB, raw []byte) good {
	t.Helper()
	envelope, signature, err := state.Split(raw)
	if err != nil {
		t.Fatal(err)
	}
	e, _, err := state.ParseEnvelope(envelope)
	if err != nil {
		t.Fatal(err)
	}
	return good{raw, envelope, signature, e}
}

// statementOf signs a verdict on any bytes.
func statementOf(t testing.TB, w *statetest.World, custodian string, v approval.Verdict, proposal []byte, context string) approval.Statement {
	t.Helper()
	key := w.Custodian(custodian)
	sig, err := key.Sign(approval.Message(v, proposal), []byte(context))
	if err != nil {
		t.Fatal(err)
	}
	return approval.Statement{
		Proposal: approval.ProposalID(proposal), Verdict: v, Custodian: custodian, Signature: sig,
		Credential: statetest.Record(custodian, "", 0, key).Credentials[0].ID,
	}
}

// besiege returns a cluster in which everything is under way at once.
func besiege(t testing.TB) *siege {
	t.Helper()
	w := rich(t)
	w.AllowImport()
	removed := w.JoinWhole("node-jp-2", "jp")
	w.RemoveNode("node-jp-2", false)
	w.CreateKey("coalition", "spare", kms.Encrypt)
	rotate := w.Propose(kms.ActionRotate, target("spare"), nil)
	w.ApproveAll(rotate)
	brought := w.Propose(kms.ActionImport, target("imported"), w.ImportParams("coalition", "imported", kms.Encrypt))
	w.ApproveAll(brought)
	wanted := w.Propose(kms.ActionImport, target("wanted"), w.ImportParams("coalition", "wanted", kms.Encrypt))
	w.Approve(wanted, "fr-1")
	kek := w.ProposeKEK("coalition")
	w.Advance(2 * time.Hour)
	short := w.Proposal(kms.ActionDeactivate, target("old"), approval.VersionParams{Version: 1})
	short.Expires = short.Created + 2*time.Minute.Milliseconds()
	expired := short.Marshal()
	w.Do(w.FirstNode(), state.OpenProposal{Proposal: expired}, statetest.As(short.Proposer))
	w.Advance(3 * time.Minute)
	suspend := w.Propose(kms.ActionSuspend, target("spare"), nil)
	w.ApproveAll(suspend)
	open := w.Propose(kms.ActionCompromise, target("spare"), approval.VersionParams{Version: 1})
	w.Approve(open, "fr-1")
	destroy := w.Propose(kms.ActionDestroy, target("spare"), approval.VersionParams{})
	w.ApproveAll(destroy) // its seven days have only begun

	g := &siege{w: w}
	g.settle(t)
	s := g.base
	revision := func(id string) statetest.Option { p, _ := s.Proposal(id); return statetest.Expect(p.Content.Revision) }
	add := func(node string, c state.Command, o ...statetest.Option) {
		g.good = append(g.good, part(t, w.Command(node, c, o...)))
	}
	for _, n := range w.NodeIDs() {
		add(n, state.Tick{})
	}
	as := statetest.As(w.Operator("fr"))
	add("node-fr-1", w.KeyringCommand("new", "fr", "de"), as)
	add("node-fr-1", w.HardwareKeyringCommand("newer", "fr", "de"), as)
	add("node-fr-1", w.KeyCommand("europe", "new", kms.Sign), as)
	add("node-fr-1", w.KeyCommand("europe", "once", kms.MAC), as, statetest.Idempotent(make([]byte, 32), make([]byte, 32)))
	add("node-fr-1", state.OpenProposal{Proposal: w.Proposal(kms.ActionSuspend, target("mail"), nil).Marshal()}, statetest.As(w.Operator("de")))
	add("node-fr-1", state.Execute{Proposal: suspend}, revision(suspend))
	add("node-fr-1", w.CommitCommand(rotate), revision(rotate))
	add("node-de-1", w.CommitKEKCommand(kek), revision(kek))
	add("node-fr-1", w.ReceiptCommand("node-fr-1", "europe", "seal", 2))
	for _, p := range s.Unsealed("node-fr-1") {
		if raw := w.Command("node-de-1", w.ResealCommand("node-fr-1", p)); s.Check(raw) == nil {
			g.good = append(g.good, part(t, raw))
		}
	}
	add("node-de-1", state.CastVote{Statement: w.Statement(open, "de-1", approval.Approve)})
	add("node-fr-1", state.CastVote{Statement: w.Statement(open, "jp-1", approval.Reject)})
	add("node-fr-1", state.CastVote{Statement: w.Statement(destroy, "de-2", approval.Reject)})
	g.refusals(t, add)
	add("node-jp-1", w.UseCommand("coalition", "mail", 2, w.Now()))
	n, _ := s.Node("node-jp-1")
	add("node-jp-1", state.KeepSeed{Root: n.Root, Suite: n.Suite, Wrapped: []byte("wrapped by the device")})
	g.suspensions()
	g.cosigned = w.CosignCommand("node-jp-1", "node-fr-1")
	add("node-jp-1", g.cosigned)
	add("node-jp-1", w.RegisterCommand("node-jp-1"))
	add("node-jp-1", w.CheckpointCommand("node-jp-1", w.Grow("node-jp-1", 3)))
	imported, _ := s.Proposal(brought)
	params, err := imported.Content.ImportParams()
	if err != nil {
		t.Fatal(err)
	}
	importing := w.ImportCommand(brought)
	add(params.Node, importing)
	g.hope(w.ImportCommand(wanted), 0)
	importing.Key.Name = "another"
	g.hope(importing, 0)
	importing = w.ImportCommand(brought)
	importing.Key.Purpose, importing.Key.Algorithm = kms.MAC, kms.MAC.Algorithms()[0]
	g.hope(importing, 0)

	for _, c := range []string{"de-1", "de-2", "fr-2", "fr-9", "jp-1"} {
		g.votes = append(g.votes, w.Statement(open, c, approval.Approve))
	}
	o, _ := s.Proposal(open)
	g.falseVotes(t, o, expired)
	g.strange = append(g.strange, removed, w.NewRoot("node-fr-1"))
	next, _ := s.Replacement("node-fr-1")
	g.strange = append(g.strange, w.RootWith("node-fr-1", next.New.Signing), w.RootWith("node-de-1", s.FormerRoots("node-de-1")[0].Signing))

	notYet, _ := s.Proposal(open)
	g.hope(state.Execute{Proposal: open}, notYet.Content.Revision)
	g.hope(state.Execute{Proposal: destroy}, g.revisionOf(destroy))
	g.hope(state.Execute{Proposal: approval.ProposalID(expired)}, short.Revision)
	for _, p := range s.Proposals() {
		if p.Progress != state.Open && p.Progress != state.Authorised {
			g.hope(state.Execute{Proposal: p.ID}, p.Content.Revision)
		}
	}
	g.foreign = besiegedStranger(t)
	return g.ready()
}

// refusals adds further kinds of commands that are acceptable in the siege.
func (g *siege) refusals(t testing.TB, add func(string, state.Command, ...statetest.Option)) {
	t.Helper()
	w, s := g.w, g.base
	for _, c := range s.Adoption("node-fr-1") {
		if c.Key == "" || len(c.Copy) == 0 {
			continue
		}
		for _, by := range []string{"node-de-1", "node-jp-1"} {
			raw := w.Command("node-fr-1", w.RefuseCommand("node-fr-1", state.Pending{Keyring: c.Keyring, Key: c.Key, Version: c.Version}, by))
			if s.Check(raw) == nil {
				g.good = append(g.good, part(t, raw))
			}
		}
	}
	for _, d := range s.Retirable("europe") {
		add("node-fr-1", state.RetireKEK{Keyring: "europe", Version: d})
	}
	again := state.Program("another")
	if news, any := s.News("node-fr-1", again); any {
		add("node-fr-1", news)
	}
}

// suspensions adds statements by which custodians suspend their colleagues' credentials,
// and such by which they must not.
func (g *siege) suspensions() {
	w := g.w
	good := func(custodian, by, node string) approval.Suspension {
		x := w.Suspension(custodian, by)
		g.suspended = append(g.suspended, x)
		g.good = append(g.good, g.part(node, state.SuspendCredential{Statement: x}))
		return x
	}
	x := good("fr-2", "fr-1", "node-fr-1")
	good("fr-1", "fr-2", "node-jp-1")
	bad := func(change func(x *approval.Suspension)) {
		b := x
		change(&b)
		g.unfit = append(g.unfit, w.SignSuspension(b))
	}
	bad(func(b *approval.Suspension) { b.Cluster = "0123456789abcdef0123456789abcdef" })
	bad(func(b *approval.Suspension) { b.Revision++ })
	bad(func(b *approval.Suspension) { b.Credential = b.With })
	bad(func(b *approval.Suspension) { b.With = b.Credential })
	g.unfit = append(g.unfit, w.Suspension("fr-1", "de-1")) // of another site
	if c, ok := g.base.Custodian("jp-2"); ok && c.Revoked {
		g.unfit = append(g.unfit, w.Suspension("jp-1", "jp-2"))
	}
	if c, ok := g.base.Custodian("fr-9"); ok { // suspended
		b := w.Suspension("fr-9", "fr-1")
		b.Credential = c.Credentials[0].ID
		g.unfit = append(g.unfit, w.SignSuspension(b), w.Suspension("fr-1", "fr-9"))
	}
}

// part is a command of a node as it signs it now.
func (g *siege) part(node string, c state.Command) good {
	raw := g.w.Command(node, c)
	envelope, signature, err := state.Split(raw)
	if err != nil {
		panic(err)
	}
	e, _, err := state.ParseEnvelope(envelope)
	if err != nil {
		panic(err)
	}
	return good{raw, envelope, signature, e}
}

func (g *siege) revisionOf(id string) uint64 {
	p, _ := g.base.Proposal(id)
	return p.Content.Revision
}

func (g *siege) hope(c state.Command, expect uint64) {
	g.hopeless, g.expects = append(g.hopeless, c), append(g.expects, expect)
}

// settle takes the state as the one that must not change, and the members' keys.
func (g *siege) settle(t testing.TB) {
	t.Helper()
	g.base = g.w.State()
	g.content = g.base.ContentHash()
	g.member = make(map[string]*statetest.Node)
	for _, id := range g.w.NodeIDs() {
		g.member[id] = g.w.Node(id)
	}
	for _, p := range g.base.Proposals() {
		g.past = append(g.past, part(t, p.Statement))
		if len(p.Execution) > 0 {
			g.past = append(g.past, part(t, p.Execution))
		}
	}
}

// falseVotes are statements with true signatures of which no vote may be made.
func (g *siege) falseVotes(t testing.TB, open state.Proposal, expired []byte) {
	t.Helper()
	w := g.w
	on := func(custodian string, change func(p *approval.Proposal)) {
		p := open.Content
		change(&p)
		// Signed for other bytes, and said to be about the proposal that is open.
		s := statementOf(t, w, custodian, approval.Approve, p.Marshal(), approval.Context)
		s.Proposal = open.ID
		g.bad = append(g.bad, s)
	}
	on("de-1", func(p *approval.Proposal) { p.Cluster = "0123456789abcdef0123456789abcdef" })
	on("de-1", func(p *approval.Proposal) { p.Target = target("mail") })
	on("de-1", func(p *approval.Proposal) { p.Nonce = make([]byte, 16) })
	on("jp-1", func(p *approval.Proposal) { p.PolicyRevision-- })
	on("jp-1", func(p *approval.Proposal) { p.Expires++ })
	for _, context := range []string{"", approval.RecoveryContext, approval.RootContext, state.CommandContext, state.GenesisContext} {
		g.bad = append(g.bad, statementOf(t, w, "de-1", approval.Approve, open.Bytes, context))
	}
	g.bad = append(g.bad,
		statementOf(t, w, "jp-2", approval.Approve, open.Bytes, approval.Context), // revoked
		statementOf(t, w, "fr-1", approval.Approve, open.Bytes, approval.Context), // has approved
		statementOf(t, w, "de-1", approval.Approve, expired, approval.Context),
	)
	w.AddCustodianKey("xx-1")
	old := w.Custodian("de-1")
	w.AddCustodianKey("de-1") // never enrolled
	g.bad = append(g.bad,
		statementOf(t, w, "xx-1", approval.Approve, open.Bytes, approval.Context),
		statementOf(t, w, "de-1", approval.Approve, open.Bytes, approval.Context),
	)
	borrowed := statementOf(t, w, "de-1", approval.Approve, open.Bytes, approval.Context)
	borrowed.Credential = statetest.Record("de-1", "", 0, old).Credentials[0].ID
	g.bad = append(g.bad, borrowed)
	for _, p := range g.base.Proposals() {
		if p.Progress == state.Open || p.Progress == state.Authorised || len(g.bad) > 40 {
			continue
		}
		g.bad = append(g.bad, statementOf(t, w, "fr-2", approval.Approve, p.Bytes, approval.Context), statementOf(t, w, "jp-1", approval.Reject, p.Bytes, approval.Context))
	}
}

// besiegedStranger returns the commands of another cluster whose nodes and custodians
// have the same names.
func besiegedStranger(t testing.TB) (l []good) {
	t.Helper()
	w := statetest.New(t, statetest.Options{})
	w.CreateKeyring("coalition", "fr", "de", "jp")
	w.CreateKey("coalition", "mail", kms.Encrypt)
	w.Rotate("coalition", "mail")
	id := w.Propose(kms.ActionCompromise, target("mail"), approval.VersionParams{Version: 1})
	vote := w.Statement(id, "de-1", approval.Approve)
	for _, p := range w.State().Proposals() {
		l = append(l, part(t, p.Statement))
		if len(p.Execution) > 0 {
			l = append(l, part(t, p.Execution))
		}
	}
	l = append(l, part(t, w.Command("node-fr-1", state.CastVote{Statement: vote})), part(t, w.Command("node-fr-1", state.Tick{})),
		part(t, w.Command("node-fr-1", w.KeyCommand("coalition", "new", kms.MAC), statetest.As(w.Operator("fr")))))
	return l
}

// afterRecovery is a siege in a second epoch: what was good in the first one, and
// signed by the same nodes and custodians, is among what attackers have.
func afterRecovery(t testing.TB) *siege {
	t.Helper()
	w := statetest.New(t, statetest.Options{})
	w.CreateKeyring("coalition", "fr", "de", "jp")
	w.GiveReceipts()
	w.CreateKey("coalition", "mail", kms.Encrypt)
	w.Announce()
	lost := w.Propose(kms.ActionRotate, target("mail"), nil)
	was, _ := w.State().Proposal(lost)
	w.ApproveAll(lost)
	g := &siege{w: w}
	old := func(node string, c state.Command, o ...statetest.Option) {
		g.foreign = append(g.foreign, part(t, w.Command(node, c, o...)))
	}
	old("node-fr-1", w.CommitCommand(lost), statetest.Expect(was.Content.Revision))
	old("node-fr-1", state.CastVote{Statement: w.Statement(lost, "jp-2", approval.Approve)})
	old("node-jp-1", state.Tick{})
	old("node-fr-1", state.SuspendCredential{Statement: w.Suspension("fr-2", "fr-1")})
	old("node-fr-1", w.KeyCommand("coalition", "new", kms.MAC), statetest.As(w.Operator("fr")))
	old("node-fr-1", state.OpenProposal{Proposal: w.Proposal(kms.ActionSuspend, target("mail"), nil).Marshal()}, statetest.As(w.Operator("de")))
	w.Recover(w.State(), "node-de-1", "node-fr-1", "node-jp-1")
	w.Announce()
	open := w.Propose(kms.ActionRotate, target("mail"), nil)
	w.Approve(open, "fr-1")
	g.settle(t)
	add := func(node string, c state.Command, o ...statetest.Option) {
		g.good = append(g.good, part(t, w.Command(node, c, o...)))
	}
	add("node-jp-1", state.Tick{})
	add("node-fr-1", w.KeyCommand("coalition", "new", kms.MAC), statetest.As(w.Operator("fr")))
	add("node-fr-1", state.CastVote{Statement: w.Statement(open, "de-1", approval.Approve)})
	add("node-fr-1", state.OpenProposal{Proposal: w.Proposal(kms.ActionSuspend, target("mail"), nil).Marshal()}, statetest.As(w.Operator("de")))
	g.suspensions()
	for _, c := range []string{"de-1", "de-2", "fr-2", "jp-1"} {
		g.votes = append(g.votes, w.Statement(open, c, approval.Approve))
	}
	o, _ := g.base.Proposal(open)
	// The approvals of the proposal that was lost, on itself and said to be on this one.
	for _, v := range was.Votes {
		g.bad = append(g.bad, v.Statement)
	}
	for _, c := range []string{"de-1", "jp-1", "fr-2"} {
		s := statementOf(t, w, c, approval.Approve, was.Bytes, approval.Context)
		on := s
		on.Proposal = open
		g.bad = append(g.bad, s, on)
	}
	g.bad = append(g.bad, statementOf(t, w, "fr-1", approval.Approve, o.Bytes, approval.Context))
	g.strange = append(g.strange, w.NewRoot("node-fr-1"), w.NewRoot("node-jp-1"))
	g.hope(state.Execute{Proposal: open}, o.Content.Revision)
	g.hope(state.Execute{Proposal: lost}, was.Content.Revision)
	commit := w.CommitCommand(open)
	g.hope(commit, o.Content.Revision)
	commit.Proposal = lost
	g.hope(commit, was.Content.Revision)
	return g.ready()
}

// sign signs an envelope's bytes with a key, as Node.SignCommand does.
func sign(n *statetest.Node, envelope []byte) []byte {
	digest, err := pqc.Digest(pqc.SuiteID(n.Record.SigningSuite), envelope, []byte(state.CommandContext))
	if err != nil {
		panic(err) // a root's suite signs digests
	}
	sig, err := n.Sign(context.Background(), digest)
	if err != nil {
		panic(err)
	}
	return state.Join(envelope, sig)
}

// fresh returns an envelope for a command by a member, with a nonce of its own.
func (g *siege) fresh(r *rand.Rand, node string, c state.Command) state.Envelope {
	e := state.NewEnvelope(c)
	e.Cluster, e.Origin, e.Time = g.base.Lineage(), node, g.base.Clock()
	e.Nonce = binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, r.Uint64()), r.Uint64())
	return e
}

// byMember signs an envelope with the present key of its origin.
func (g *siege) byMember(e state.Envelope) []byte { return sign(g.member[e.Origin], e.Marshal()) }

// anyMember returns a member.
func (g *siege) anyMember(r *rand.Rand) string {
	ids := make([]string, 0, len(g.member))
	for id := range g.member {
		ids = append(ids, id)
	}
	slices.Sort(ids)
	return statetest.Pick(r, ids)
}

// cast returns a vote in a member's envelope.
func (g *siege) cast(r *rand.Rand, s approval.Statement) []byte {
	return g.byMember(g.fresh(r, g.anyMember(r), state.CastVote{Statement: s}))
}

// edited returns a statement with one field changed.
func edited[T any](r *rand.Rand, s T) T {
	for {
		v, err := statetest.Loose(canon.Marshal(s))
		if err != nil {
			panic(err)
		}
		b := canon.Marshal(statetest.Editor{R: r}.Change(v))
		var out T
		if canon.Unmarshal(b, &out) == nil && string(canon.Marshal(out)) != string(canon.Marshal(s)) {
			return out
		}
	}
}
