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

// TestProperties draws logs and checks, command by command and for the whole, what
// must hold for every log.
func TestProperties(t *testing.T) {
	t.Parallel()
	world, first := start(t)
	begin := world.w.State()
	rapid.Check(t, func(rt *rapid.T) {
		a := &actor{w: world.w, log: slices.Clone(world.log)}
		a.w.SetState(begin)
		n := rapid.IntRange(1, 70).Draw(rt, "length")
		restoreAt := rapid.IntRange(1, n).Draw(rt, "restore at")
		var leaves [][]byte
		made := first
		for i, raw := range a.log {
			var r state.Result
			made, r = made.Apply(uint64(i+1), raw)
			leaves = append(leaves, r.Leaf)
		}
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

// activated reports whether it was a quorum's decision not to wait for a version's
// receipts that made it primary: one about this version, carried out at that time.
func activated(s *state.State, v state.Version) bool {
	return slices.ContainsFunc(s.Proposals(), func(p state.Proposal) bool {
		params, err := p.Content.VersionParams()
		return err == nil && p.Content.Action == kms.ActionActivate && p.Progress == state.Executed &&
			p.Content.Target == approval.KeyTarget(v.Keyring, v.Key) && params.Version == v.Version && p.ClosedAt == v.Activated
	})
}

// check holds the invariants of any state.
func check(t *rapid.T, s *state.State) {
	checkRoots(t, s)
	checkKEKs(t, s)
	for _, k := range append(s.Keys("ring"), s.Keys("vault")...) {
		versions := s.Versions(k.Keyring, k.Name)
		if len(versions) != int(k.Latest) {
			t.Fatalf("key %s has %d versions, latest is %d", k.Name, len(versions), k.Latest)
		}
		for i, v := range versions {
			if v.Version != uint32(i+1) || v.State.Gone() == (len(v.Wrapped)+len(v.Copies) > 0) || (v.Generated != "") != (k.Keyring == "vault") {
				t.Fatalf("key %s version %d: %s with %d bytes and %d copies", k.Name, v.Version, v.State, len(v.Wrapped), len(v.Copies))
			}
			if v.Version == k.Primary && v.State != kms.Active {
				t.Fatalf("the primary version of %s is %s", k.Name, v.State)
			}
			if v.Version > 1 && v.State == kms.Active && len(v.Receipts) != 3 && (len(v.Receipts) == 0 || !activated(s, v)) {
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

// checkRoots holds the invariants of hardware roots: copies are for present or next
// roots alone, a KEK has one for every present root, no signing key serves twice.
func checkRoots(t *rapid.T, s *state.State) {
	used := map[string]bool{}
	use := func(signing []byte) {
		if used[string(signing)] {
			t.Fatal("a signing key serves twice")
		}
		used[string(signing)] = true
	}
	root := map[string]uint32{}
	for _, n := range s.Nodes() {
		use(n.Signing)
		root[n.ID] = n.Root
		for _, f := range s.FormerRoots(n.ID) {
			use(f.Signing)
		}
		next, pending := s.Replacement(n.ID)
		if pending {
			use(next.New.Signing)
			if next.Root <= n.Root || s.NextRoot(n.ID) != next.Root+1 {
				t.Fatalf("node %s has root %d and %d comes next", n.ID, n.Root, next.Root)
			}
		}
		type turn struct {
			p  state.Pending
			by string
		}
		turns := map[turn]bool{}
		for _, x := range s.Refused(n.ID) {
			its := turn{state.Pending{Keyring: x.Keyring, Key: x.Key, Version: x.Version}, x.By}
			if turns[its] || x.By == n.ID || x.Root != n.Root && x.Root != next.Root {
				t.Fatalf("node %s has refused %+v, %v", n.ID, x, turns)
			}
			turns[its] = true
		}
		if got, want := s.Unsealed(n.ID), plainUnsealed(s, n, next); !slices.Equal(got, want) {
			t.Fatalf("unsealed of %s: %v, want %v", n.ID, got, want)
		}
	}
	copies := func(what string, l []state.SealedCopy) (present int) {
		for _, c := range l {
			next, _ := s.Replacement(c.Node)
			if c.Root != root[c.Node] && c.Root != next.Root {
				t.Fatalf("%s has a copy for root %d of %s", what, c.Root, c.Node)
			}
			if c.Root == root[c.Node] {
				present++
			}
		}
		return present
	}
	for _, kek := range s.KEKs("ring") {
		if n := copies("the KEK", kek.Copies); n != 3 && !(n == 0 && kek.Retired()) {
			t.Fatalf("KEK version %d has copies for %d nodes", kek.Version, n)
		}
	}
	for _, k := range s.Keys("vault") {
		for _, v := range s.Versions("vault", k.Name) {
			copies(k.Name, v.Copies)
		}
	}
}

// plainUnsealed is State.Unsealed without an index.
func plainUnsealed(s *state.State, n state.Node, next state.Replacement) (l []state.Pending) {
	lacks := func(copies []state.SealedCopy) bool {
		has := func(root uint32) bool {
			return slices.ContainsFunc(copies, func(c state.SealedCopy) bool { return c.Node == n.ID && c.Root == root })
		}
		return next.Root != 0 && has(n.Root) && !has(next.Root)
	}
	for _, kek := range s.KEKs("ring") {
		if lacks(kek.Copies) {
			l = append(l, state.Pending{Keyring: "ring", Version: kek.Version})
		}
	}
	for _, k := range s.Keys("vault") {
		for _, v := range s.Versions("vault", k.Name) {
			if lacks(v.Copies) {
				l = append(l, state.Pending{Keyring: "vault", Key: k.Name, Version: v.Version})
			}
		}
	}
	return l
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
	ring := a.log[3]
	key := w.Command("node-fr-1", w.KeyCommand("ring", "a", kms.Encrypt), statetest.As(w.Operator("fr")))
	w.Apply(key)
	p := w.Proposal(kms.ActionRotate, approval.KeyTarget("ring", "a"), nil)
	open := w.Command("node-fr-1", state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer))
	w.Apply(open)
	id := approval.ProposalID(p.Marshal())
	vote := w.Command("node-de-1", state.CastVote{Statement: w.Statement(id, "fr-1", approval.Approve)})
	vote2 := w.Command("node-de-1", state.CastVote{Statement: w.Statement(id, "de-1", approval.Approve)})
	commit := w.Command("node-de-1", w.CommitCommand(id), statetest.Expect(1))
	log := [][]byte{ring, key, open, vote, vote2, commit}
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
		w.KeyCommand("vault", "new", kms.Sign), w.HardwareKeyringCommand("new", "fr"), w.KeyCommand("vault", "new", kms.MAC), w.AdoptCommand("node-fr-1"),
		w.RefuseCommand("node-fr-1", state.Pending{Keyring: "vault", Key: "sig", Version: 1}, "node-de-1"),
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
		w.ResealCommand("node-fr-1", s.Unsealed("node-fr-1")[0]), w.AdoptCommand("node-fr-1"),
		w.RefuseCommand("node-fr-1", state.Pending{Keyring: "vault", Key: "sig", Version: 1}, "node-de-1"),
	} {
		f.Add(uint16(i+1), uint64(0), w.Operator("fr"), state.NewEnvelope(cmd).Payload)
	}
	node := w.Node("node-fr-1")
	next, _ := s.Replacement("node-fr-1")
	nextRoot := w.RootWith("node-fr-1", next.New.Signing)
	f.Fuzz(func(t *testing.T, kind uint16, expect uint64, principal string, payload []byte) {
		e := w.Envelope("node-fr-1", state.Tick{})
		e.Type, e.Expect, e.Principal, e.Payload = state.Type(kind), expect, strings.ToValidUTF8(principal, ""), payload
		by := node
		if e.Type == state.TypeAdoptRoot || e.Type == state.TypeRefuseCopy {
			by = nextRoot
		}
		next, r := s.Apply(s.Index()+1, by.SignCommand(t, e.Marshal()))
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
