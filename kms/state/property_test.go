package state_test

import (
	"bytes"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/transparency-dev/merkle/rfc6962"
	"pgregory.net/rapid"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// actor draws commands, sensible and not, for a world.
type actor struct {
	w   *statetest.World
	log [][]byte
}

// draw returns a signed command that may or may not be acceptable now.
func (a *actor) draw(t *rapid.T) []byte {
	w, s := a.w, a.w.State()
	node := rapid.SampledFrom(w.NodeIDs()).Draw(t, "node")
	n, _ := s.Node(node)
	op := statetest.As(w.Operator(n.Site))
	name := rapid.SampledFrom([]string{"a", "b"}).Draw(t, "name")
	target := approval.KeyTarget("ring", name)
	version := uint32(rapid.IntRange(1, 3).Draw(t, "version"))
	switch rapid.IntRange(0, 13).Draw(t, "command") {
	case 0:
		ahead := rapid.SampledFrom([]int64{-700_000, 1000, 1000, 60_000, 8 * 24 * 3600_000}).Draw(t, "ahead")
		return w.Command(node, state.Tick{}, statetest.At(s.Clock()+ahead))
	case 1:
		return w.Command(node, w.KeyCommand("ring", name, kms.Encrypt), op, now(s))
	case 2, 3:
		return a.propose(t, node, target, version)
	case 4:
		return a.vote(t, node)
	case 5, 6, 7, 8, 9:
		return a.push(t, node)
	case 10:
		return w.Command(node, w.ReceiptCommand(node, "ring", name, version), now(s))
	case 11, 12:
		if owed := s.Pending(node); len(owed) > 0 {
			p := owed[len(owed)-1]
			return w.Command(node, w.ReceiptCommand(node, p.Keyring, p.Key, p.Version), now(s))
		}
	}
	return a.spoil(t)
}

// now signs at the cluster's time.
func now(s *state.State) statetest.Option { return statetest.At(s.Clock()) }

// push does what brings the newest live proposal on: an approval by somebody who
// has not voted, or its execution.
func (a *actor) push(t *rapid.T, node string) []byte {
	s := a.w.State()
	open := s.ProposalsOpen()
	if len(open) == 0 {
		return a.carry(t, node)
	}
	p := open[0]
	if p.Progress == state.Authorised {
		return a.execution(node, p)
	}
	for _, c := range []string{"fr-1", "de-1", "jp-1", "fr-2", "de-2"} {
		if !slices.ContainsFunc(p.Votes, func(v state.Vote) bool { return v.Statement.Custodian == c }) {
			return a.w.Command(node, state.CastVote{Statement: a.w.Statement(p.ID, c, approval.Approve)}, now(s))
		}
	}
	return a.vote(t, node)
}

func (a *actor) execution(node string, p state.Proposal) []byte {
	expect := statetest.Expect(p.Content.Revision)
	if p.Content.Action == kms.ActionRotate {
		return a.w.Command(node, a.w.CommitCommand(p.ID), expect, now(a.w.State()))
	}
	return a.w.Command(node, state.Execute{Proposal: p.ID}, expect, now(a.w.State()))
}

func (a *actor) propose(t *rapid.T, node, target string, version uint32) []byte {
	w := a.w
	action := rapid.SampledFrom(append([]kms.Action{kms.ActionPolicy, kms.ActionCustodian}, kms.KeyActions[1:]...)).Draw(t, "action")
	var params any
	switch action {
	case kms.ActionDeactivate, kms.ActionCompromise:
		params = approval.VersionParams{Version: version}
	case kms.ActionDestroy:
		params = approval.VersionParams{Version: version - 1}
	case kms.ActionPolicy:
		target = "policy/standard"
		rules := statetest.Policies(3)[1].Rules
		rules[5].Delay = int64(version) * 1000
		params = approval.PolicyParams{Rules: rules}
	case kms.ActionCustodian:
		target = "custodian/jp-2"
		c := statetest.Record("jp-2", "jp", 0, w.Custodian("jp-2"))
		c.Revoked = rapid.Bool().Draw(t, "revoked")
		params = approval.CustodianParams{Custodian: c}
	}
	p := w.Proposal(action, target, params)
	p.Created = w.State().Clock()
	p.Expires = p.Created + rapid.SampledFrom([]int64{2000, 72 * 3600_000, 72 * 3600_000, 30 * 24 * 3600_000}).Draw(t, "life")
	return w.Command(node, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer), now(w.State()))
}

func (a *actor) pick(t *rapid.T) (state.Proposal, bool) {
	l := a.w.State().Proposals()
	if len(l) == 0 {
		return state.Proposal{}, false
	}
	return l[rapid.IntRange(0, min(3, len(l)-1)).Draw(t, "proposal")], true
}

func (a *actor) vote(t *rapid.T, node string) []byte {
	p, ok := a.pick(t)
	if !ok {
		return a.spoil(t)
	}
	custodian := rapid.SampledFrom([]string{"fr-1", "fr-2", "de-1", "jp-1", "jp-2"}).Draw(t, "custodian")
	verdict := rapid.SampledFrom([]approval.Verdict{approval.Approve, approval.Approve, approval.Approve, approval.Reject}).Draw(t, "verdict")
	return a.w.Command(node, state.CastVote{Statement: a.w.Statement(p.ID, custodian, verdict)}, now(a.w.State()))
}

func (a *actor) carry(t *rapid.T, node string) []byte {
	p, ok := a.pick(t)
	if !ok {
		return a.spoil(t)
	}
	return a.execution(node, p)
}

// spoil returns a replay, a mutation or a stranger's command, none of which may
// have an effect.
func (a *actor) spoil(t *rapid.T) []byte {
	if len(a.log) == 0 {
		return []byte("garbage")
	}
	raw := bytes.Clone(rapid.SampledFrom(a.log).Draw(t, "old"))
	switch rapid.IntRange(0, 2).Draw(t, "spoil") {
	case 0:
		return raw
	case 1:
		if len(raw) > 0 {
			raw[rapid.IntRange(0, len(raw)-1).Draw(t, "at")] ^= byte(rapid.IntRange(1, 255).Draw(t, "bits"))
		}
		return raw
	}
	e := a.w.Envelope("node-fr-1", state.Tick{}, statetest.At(a.w.Now()+9_000_000))
	e.Cluster = "11111111111111111111111111111111"
	return a.w.Sign(e)
}

// start returns a fresh cluster with a keyring and the log that made it.
func start(t testing.TB) (*actor, *state.State) {
	w := statetest.New(t, statetest.Options{})
	first := w.State()
	a := &actor{w: w}
	a.log = append(a.log, w.Command("node-fr-1", w.KeyringCommand("ring", "fr", "de", "jp"), statetest.As(w.Operator("fr"))))
	w.Apply(a.log[0])
	return a, first
}

// TestProperties draws logs and checks, command by command and for the whole, what
// must hold for every log.
func TestProperties(t *testing.T) {
	world, first := start(t)
	begin := world.w.State()
	rapid.Check(t, func(rt *rapid.T) {
		a := &actor{w: world.w, log: [][]byte{world.log[0]}}
		a.w.SetState(begin)
		n := rapid.IntRange(1, 70).Draw(rt, "length")
		restoreAt := rapid.IntRange(1, n).Draw(rt, "restore at")
		var leaves [][]byte
		_, r := first.Apply(1, a.log[0])
		leaves = append(leaves, r.Leaf)
		var copied *state.State
		for i := range n {
			raw := a.draw(rt)
			step(rt, a.w, raw, &leaves)
			a.log = append(a.log, raw)
			if copied != nil {
				copied, _ = copied.Apply(copied.Index()+1, raw)
			}
			if i+1 == restoreAt {
				copied = restored(rt, a.w.State())
			}
		}
		last := a.w.State()
		if copied.Hash() != last.Hash() {
			rt.Fatal("a restored state went on differently")
		}
		// A replica that applies the same log has the same state.
		replica := first
		for i, raw := range a.log {
			replica, _ = replica.Apply(uint64(i+1), raw)
		}
		if replica.Hash() != last.Hash() {
			rt.Fatal("two replicas of the same log differ")
		}
		if !bytes.Equal(last.LogRoot(), plainRoot(leaves)) || last.LogSize() != uint64(len(leaves)) {
			rt.Fatal("the log root is not that of RFC 6962 over the leaves")
		}
		if restored(rt, last).Hash() != last.Hash() {
			rt.Fatal("a restored state differs")
		}
		check(rt, last)
	})
}

// step applies one command and holds its result against the state.
func step(t *rapid.T, w *statetest.World, raw []byte, leaves *[][]byte) {
	before := w.State()
	content, hash := before.ContentHash(), before.Hash()
	err := before.Check(raw)
	r := w.Apply(raw)
	if kms.KindOf(err) != r.Kind && !r.Duplicate {
		t.Fatalf("Check says %v, Apply %v %s", err, r.Kind, r.Message)
	}
	if r.Kind != 0 && w.State().ContentHash() != content {
		t.Fatalf("a refused command (%s) had an effect", r.Message)
	}
	if before.Hash() != hash {
		t.Fatal("Apply changed the state that it was applied to")
	}
	*leaves = append(*leaves, r.Leaf)
}

// restored writes a snapshot and reads it back without trust.
func restored(t *rapid.T, s *state.State) *state.State {
	var b bytes.Buffer
	if err := s.Snapshot(&b); err != nil {
		t.Fatal(err)
	}
	got, err := state.Restore(&b, nil)
	if err != nil {
		t.Fatalf("a true snapshot is refused: %v", err)
	}
	return got
}

// check holds the invariants of any state.
func check(t *rapid.T, s *state.State) {
	for _, k := range s.Keys("ring") {
		versions := s.Versions("ring", k.Name)
		if len(versions) != int(k.Latest) {
			t.Fatalf("key %s has %d versions, latest is %d", k.Name, len(versions), k.Latest)
		}
		for i, v := range versions {
			if v.Version != uint32(i+1) || v.State.Gone() == (len(v.Wrapped) > 0) {
				t.Fatalf("key %s version %d: %s with %d bytes", k.Name, v.Version, v.State, len(v.Wrapped))
			}
			if v.Version == k.Primary && v.State != kms.Active {
				t.Fatalf("the primary version of %s is %s", k.Name, v.State)
			}
			if v.Version > 1 && v.State == kms.Active && len(v.Receipts) != 3 {
				t.Fatalf("version %d of %s is active with %d receipts", v.Version, k.Name, len(v.Receipts))
			}
		}
	}
	type subject struct{ target, action string }
	live := map[subject]bool{}
	for _, p := range s.ProposalsOpen() {
		at := subject{p.Content.Target, string(p.Content.Action)}
		if live[at] {
			t.Fatalf("two proposals are open for %v", at)
		}
		live[at] = true
	}
	for _, p := range s.Proposals() {
		d, _, _ := s.Decision(p.ID)
		if p.Progress == state.Authorised && !d.Met {
			t.Fatalf("proposal %s is authorised, but %v is missing", p.ID, d.Missing)
		}
		if p.Progress == state.Executed && p.Content.Action == kms.ActionDestroy && p.ClosedAt < p.AuthorisedAt+7*24*time.Hour.Milliseconds() {
			t.Fatalf("proposal %s was carried out too early", p.ID)
		}
	}
}

// plainRoot is the Merkle tree hash of RFC 6962, section 2.1, as it is written there.
func plainRoot(leaves [][]byte) []byte {
	h := rfc6962.DefaultHasher
	switch n := len(leaves); n {
	case 0:
		return h.EmptyRoot()
	case 1:
		return h.HashLeaf(leaves[0])
	default:
		k := 1
		for 2*k < n {
			k *= 2
		}
		return h.HashChildren(plainRoot(leaves[:k]), plainRoot(leaves[k:]))
	}
}

// TestReorder applies a log in another order: what depends on what is missing is
// refused, and no order makes a statement count twice.
func TestReorder(t *testing.T) {
	a, first := start(t)
	w := a.w
	key := w.Command("node-fr-1", w.KeyCommand("ring", "a", kms.Encrypt), statetest.As(w.Operator("fr")))
	w.Apply(key)
	p := w.Proposal(kms.ActionRotate, approval.KeyTarget("ring", "a"), nil)
	open := w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	w.Apply(open)
	id := approval.ProposalID(p.Marshal())
	vote := w.Command("node-de-1", state.CastVote{Statement: w.Statement(id, "fr-1", approval.Approve)})
	vote2 := w.Command("node-de-1", state.CastVote{Statement: w.Statement(id, "de-1", approval.Approve)})
	commit := w.Command("node-de-1", w.CommitCommand(id), statetest.Expect(1))
	log := [][]byte{a.log[0], key, open, vote, vote2, commit}
	rapid.Check(t, func(rt *rapid.T) {
		order := rapid.Permutation([]int{0, 1, 2, 3, 4, 5}).Draw(rt, "order")
		s := first
		applied := map[int]bool{}
		for i, n := range append(order, order...) { // and everything once more
			var r state.Result
			s, r = s.Apply(uint64(i+1), log[n])
			if r.Kind == 0 {
				if applied[n] {
					rt.Fatalf("command %d applied twice", n)
				}
				for m := range n {
					// A vote does not wait for the other vote.
					if !applied[m] && !(n == 4 && m == 3) {
						rt.Fatalf("command %d applied before %d", n, m)
					}
				}
				applied[n] = true
			}
		}
		if p, ok := s.Proposal(id); ok && len(p.Votes) > 2 {
			rt.Fatal("a vote counts twice")
		}
	})
}

func FuzzApply(f *testing.F) {
	w := rich(f)
	s := w.State()
	for _, cmd := range []state.Command{
		state.Tick{}, w.KeyringCommand("new", "fr"), w.KeyCommand("europe", "new", kms.Sign),
		w.ReceiptCommand("node-fr-1", "europe", "seal", 2), state.Execute{Proposal: s.Proposals()[0].ID},
	} {
		f.Add(w.Command("node-fr-1", cmd, statetest.As(w.Operator("fr"))))
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, raw []byte) {
		next, r := s.Apply(s.Index()+1, raw)
		if r.Halt || r.Kind != 0 && next.ContentHash() != s.ContentHash() {
			t.Fatalf("%+v", r)
		}
		if _, err := state.ParseLeaf(r.Leaf); err != nil {
			t.Fatal(err)
		}
	})
}

// FuzzPayload applies arbitrary payloads and envelopes with a good signature.
func FuzzPayload(f *testing.F) {
	w := rich(f)
	s := w.State()
	for i, cmd := range []state.Command{
		state.Tick{}, w.KeyringCommand("new", "fr"), w.KeyCommand("europe", "new", kms.Sign), state.OpenProposal{Proposal: w.Proposal(kms.ActionRotate, target("mail"), nil).Marshal()},
		state.CastVote{}, state.Execute{Proposal: s.Proposals()[0].ID}, state.CommitRotation{}, w.ReceiptCommand("node-fr-1", "europe", "seal", 2),
	} {
		f.Add(uint16(i+1), uint64(0), w.Operator("fr"), state.NewEnvelope(cmd).Payload)
	}
	node := w.Node("node-fr-1")
	f.Fuzz(func(t *testing.T, kind uint16, expect uint64, principal string, payload []byte) {
		e := w.Envelope("node-fr-1", state.Tick{})
		e.Type, e.Expect, e.Principal, e.Payload = state.Type(kind), expect, strings.ToValidUTF8(principal, ""), payload
		next, r := s.Apply(s.Index()+1, node.SignCommand(t, e.Marshal()))
		if r.Kind != 0 && next.ContentHash() != s.ContentHash() {
			t.Fatalf("%+v", r)
		}
	})
}

func FuzzEnvelope(f *testing.F) {
	w := statetest.New(f, statetest.Options{})
	raw := w.Command("node-fr-1", state.Tick{})
	env, _, _ := state.Split(raw)
	f.Add(raw)
	f.Add(env)
	f.Fuzz(func(t *testing.T, b []byte) {
		if e, s, err := state.Split(b); err == nil && !bytes.Equal(state.Join(e, s), b) {
			t.Fatal("Split and Join do not agree")
		}
		if e, cmd, err := state.ParseEnvelope(b); err == nil {
			if !bytes.Equal(e.Marshal(), b) || !bytes.Equal(state.NewEnvelope(cmd).Payload, e.Payload) {
				t.Fatal("ParseEnvelope and Marshal do not agree")
			}
		}
	})
}

func FuzzGenesis(f *testing.F) {
	w := statetest.New(f, statetest.Options{})
	f.Add(w.Signed().Genesis)
	f.Add(w.Signed().Marshal())
	f.Fuzz(func(t *testing.T, b []byte) {
		if g, err := state.ParseGenesis(b); err == nil && !bytes.Equal(g.Marshal(), b) {
			t.Fatal("ParseGenesis and Marshal do not agree")
		}
		if s, err := state.ParseSignedGenesis(b); err == nil {
			if !bytes.Equal(s.Marshal(), b) {
				t.Fatal("ParseSignedGenesis and Marshal do not agree")
			}
			_, _ = state.New(s)
		}
	})
}

func FuzzRestore(f *testing.F) {
	s := rich(f).State()
	f.Add(snapshot(f, s), true)
	f.Add(snapshot(f, statetest.New(f, statetest.Options{}).State()), false)
	f.Fuzz(func(t *testing.T, b []byte, trust bool) {
		got, err := state.Restore(bytes.NewReader(b), func([32]byte) bool { return trust })
		if err != nil {
			return
		}
		var again bytes.Buffer
		if err := got.Snapshot(&again); err != nil || !bytes.HasPrefix(b, again.Bytes()) {
			t.Fatal("Restore and Snapshot do not agree")
		}
		got.Pending("node-fr-1")
		got.ProposalsOpen()
	})
}

func BenchmarkCreateKey(b *testing.B) {
	for _, p384 := range []bool{false, true} {
		b.Run(fmt.Sprintf("p384=%v", p384), func(b *testing.B) {
			w := statetest.New(b, statetest.Options{P384: p384})
			w.CreateKeyring("ring", "fr", "de", "jp")
			raws := make([][]byte, b.N)
			for i := range raws {
				raws[i] = w.Command("node-fr-1", w.KeyCommand("ring", fmt.Sprintf("k%d", i), kms.Encrypt), statetest.As(w.Operator("fr")))
			}
			s := w.State()
			b.ReportAllocs()
			b.ResetTimer()
			for _, raw := range raws {
				var r state.Result
				if s, r = s.Apply(s.Index()+1, raw); r.Kind != 0 {
					b.Fatal(r.Message)
				}
			}
		})
	}
}

// BenchmarkRestore reads a snapshot with 1,000 keys.
func BenchmarkRestore(b *testing.B) {
	w := statetest.New(b, statetest.Options{})
	w.CreateKeyring("ring", "fr", "de", "jp")
	for i := range 1000 {
		w.CreateKey("ring", fmt.Sprintf("k%d", i), kms.Encrypt)
	}
	snap := snapshot(b, w.State())
	for name, trusted := range map[string]func([32]byte) bool{"trusted": yes, "untrusted": no} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(snap)))
			for b.Loop() {
				if _, err := state.Restore(bytes.NewReader(snap), trusted); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
