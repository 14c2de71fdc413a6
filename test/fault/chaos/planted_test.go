package chaos

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// honest is a history as a sound cluster makes it: a key, a rotation that two
// custodians approve, and readings in between.
func honest() []Op {
	at := func(o Op, call int) Op {
		o.Key, o.Node, o.Call, o.Return = "k", "fr-1", time.Duration(call)*time.Second, time.Duration(call+1)*time.Second
		return o
	}
	fr1, de1 := slices.Index(custodians[:], "fr-1"), slices.Index(custodians[:], "de-1")
	one, two := votes{}, votes{}
	one[fr1] = approve
	two[fr1], two[de1] = approve, approve
	return []Op{
		at(Op{Kind: ReadKey, Outcome: NotFound}, 0),
		at(Op{Kind: CreateKey, Outcome: OK}, 2),
		at(Op{Kind: ReadKey, Outcome: OK, Latest: 1, Primary: 1, Revision: 1}, 4),
		at(Op{Kind: OpenProposal, Outcome: OK, ID: "p", Action: kms.ActionRotate}, 6),
		at(Op{Kind: ReadKey, Outcome: OK, Latest: 1, Primary: 1, Revision: 1, IDs: []string{"p"}}, 8),
		at(Op{Kind: Vote, Outcome: OK, ID: "p", Custodian: fr1, Verdict: approve}, 10),
		at(Op{Kind: ReadProposal, Outcome: OK, ID: "p", Progress: open, Votes: one}, 12),
		at(Op{Kind: Vote, Outcome: OK, ID: "p", Custodian: de1, Verdict: approve}, 14),
		at(Op{Kind: ReadProposal, Outcome: OK, ID: "p", Progress: authorised, Met: true, Votes: two}, 16),
		at(Op{Kind: ReadKey, Outcome: OK, Latest: 2, Primary: 1, Revision: 2}, 18),
		at(Op{Kind: ReadKey, Outcome: OK, Latest: 2, Primary: 2, Revision: 3}, 20),
		at(Op{Kind: ReadProposal, Outcome: OK, ID: "p", Progress: executed, Votes: two}, 22),
	}
}

// TestCheckerDecides: the honest history passes; each lie about it is found.
func TestCheckerDecides(t *testing.T) {
	if v := Check(honest(), time.Minute, ""); len(v.Violations)+len(v.Undecided) > 0 || v.Keys != 1 || v.Ops != 12 {
		t.Fatalf("the honest history: %+v", v)
	}
	lies := map[string]func(h []Op) []Op{
		"a stale read of the key":           func(h []Op) []Op { h[9], h[10] = swapTimes(h[9], h[10]); return h },
		"a stale read of the proposal":      func(h []Op) []Op { h[6], h[8] = swapTimes(h[6], h[8]); return h },
		"a key that was not there any more": func(h []Op) []Op { h[0], h[2] = swapTimes(h[0], h[2]); return h },
		"a lost key": func(h []Op) []Op {
			return append(h[:2:2], Op{Kind: ReadKey, Key: "k", Call: time.Hour, Return: time.Hour, Outcome: NotFound})
		},
		"a lost vote":                           func(h []Op) []Op { h[8].Votes, h[8].Progress, h[8].Met = h[6].Votes, open, false; return h[:9] },
		"a lost proposal":                       func(h []Op) []Op { h[4].IDs = nil; return h[:5] },
		"a quorum of one nation":                func(h []Op) []Op { h[7].Custodian = slices.Index(custodians[:], "fr-2"); return h },
		"a custodian counted twice":             func(h []Op) []Op { h[7].Custodian = h[5].Custodian; return h },
		"a decision without its votes":          func(h []Op) []Op { h[6].Met, h[6].Progress = true, authorised; return h },
		"a rotation without a quorum":           func(h []Op) []Op { return slices.Delete(h, 7, 9) },
		"a rotation without a proposal":         func(h []Op) []Op { return slices.Delete(h, 3, 9) },
		"two versions for one approval":         func(h []Op) []Op { h[9].Latest, h[10].Latest = 3, 3; return h },
		"a suspension that nobody asked for":    func(h []Op) []Op { h[10].Suspended = true; return h },
		"a revision that goes back":             func(h []Op) []Op { h[10].Revision = 1; return h },
		"an executed proposal that still lives": func(h []Op) []Op { h[10].IDs = []string{"p"}; return h },
	}
	for name, lie := range lies {
		if v := Check(lie(honest()), time.Minute, ""); len(v.Violations) != 1 {
			t.Errorf("%s is not found", name)
		}
	}
	// What nobody was told of may be or not be.
	for _, happened := range []bool{false, true} {
		h := honest()
		h[7].Outcome = Unknown
		if !happened {
			h = h[:8]
			h = append(h, Op{Kind: ReadProposal, Key: "k", ID: "p", Call: time.Hour, Return: time.Hour, Outcome: OK, Progress: open, Votes: h[6].Votes})
		}
		if v := Check(h, time.Minute, ""); len(v.Violations)+len(v.Undecided) > 0 {
			t.Errorf("an unknown outcome (%v): %+v", happened, v)
		}
	}
}

// swapTimes has the later operation answered first.
func swapTimes(a, b Op) (Op, Op) {
	a.Call, a.Return, b.Call, b.Return = b.Call, b.Return, a.Call, a.Return
	return a, b
}

// plantedBugs are two faults of the product that the checker must find: readings that
// are answered from whatever a node has, and writes that are acknowledged although
// their outcome is unknown.
var plantedBugs = harness.Patch{
	"kms/engine/consistency.go": {{Old: "	err := e.cluster.Barrier(ctx)\n", New: "	var err error\n"}},
	"kms/engine/write.go": {{
		Old: "	res, err := c.Propose(ctx, state.Join(b, sig))\n	if err != nil {\n",
		New: "	res, err := c.Propose(ctx, state.Join(b, sig))\n	if kms.KindOf(err) == kms.Unknown {\n		return res, nil\n	}\n	if err != nil {\n",
	}},
}

// TestPlantedBugs runs a product with both faults. A follower that is cut off shows what
// is no longer so; a leader that is cut off takes a vote that is then gone.
func TestPlantedBugs(t *testing.T) {
	bin := binaries(t)
	dir := t.TempDir()
	patched, err := plantedBugs.Build(t.Context(), filepath.Join(dir, "patched"))
	if err != nil {
		t.Fatal(err)
	}
	c, err := harness.Found(t.Context(), bin, filepath.Join(dir, "c"), harness.Plan{
		Nodes: map[string]int{"fr": 1, "de": 1, "jp": 1}, Cluster: map[string]any{"heartbeat": "1s"},
		Program: map[string]string{"fr-1": patched, "de-1": patched, "jp-1": patched},
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	}()
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err, c.Logs(10))
	}
	load, err := NewLoad(t.Context(), c, 1)
	if err != nil {
		t.Fatal(err)
	}
	defer load.Close()
	p := planted{t, c, &worker{l: load}}
	p.staleRead("stale")
	p.lostWrite("lost")
	v := Check(load.history.All(), time.Minute, os.Getenv("CONCLAVE_FAULT_DIR"))
	for _, key := range []string{"stale", "lost"} {
		if !slices.ContainsFunc(v.Violations, func(s string) bool { return strings.HasPrefix(s, key+":") }) {
			t.Errorf("the planted bug is not found in the history of the key %q; violations: %q", key, v.Violations)
		}
	}
}

type planted struct {
	t *testing.T
	c *harness.Coalition
	w *worker
}

// do makes an operation at one node until it succeeds, and records it.
func (p planted) do(o Op, n *harness.Node, f func(ctx context.Context, cl *client.Client) error) Op {
	p.t.Helper()
	err := harness.Within(p.t.Context(), time.Minute, fmt.Sprintf("%v at %s", o.Kind, n.ID), func(context.Context) error {
		o.Node, o.Call = n.ID, p.w.l.history.Now()
		err := p.w.at(n, f)
		o.Return = p.w.l.history.Now()
		return err
	})
	if err != nil {
		p.t.Fatal(err, p.c.Logs(10))
	}
	o.Outcome = OK
	p.w.l.history.Add(o)
	return o
}

func (p planted) create(key string, n *harness.Node) {
	p.t.Helper()
	p.do(Op{Kind: CreateKey, Key: key}, n, func(ctx context.Context, cl *client.Client) error {
		_, err := cl.CreateKey(ctx, ring, wire.CreateKeyRequest{Name: key, Purpose: string(kms.Encrypt)})
		return err
	})
}

// split returns the leader and the others.
func (p planted) split() (*harness.Node, []*harness.Node) {
	p.t.Helper()
	leader, err := p.c.Leader(p.t.Context())
	if err != nil {
		p.t.Fatal(err)
	}
	return leader, p.c.Except(leader)
}

// cut separates a node from the others until the function that it returns is called.
func (p planted) cut(n *harness.Node) (heal func()) {
	one, others := []*harness.Node{n}, p.c.Except(n)
	links := append(p.c.Between(one, others), p.c.Between(others, one)...)
	p.c.Links.Cut(links...)
	return func() { p.c.Links.Heal(true, links...) }
}

// staleRead reads at a follower that is cut off, after a write elsewhere.
func (p planted) staleRead(key string) {
	p.t.Helper()
	leader, others := p.split()
	heal := p.cut(others[0])
	defer heal()
	p.create(key, leader)
	if err := p.w.readKey(&slot{key: key}, others[0]); err != nil {
		p.t.Fatalf("the follower that is cut off does not answer as planted: %v", err)
	}
}

// lostWrite votes at a leader that is cut off, and looks for the vote elsewhere.
func (p planted) lostWrite(key string) {
	p.t.Helper()
	if _, err := p.c.SameLog(p.t.Context()); err != nil {
		p.t.Fatal(err)
	}
	leader, others := p.split()
	p.create(key, leader)
	var prop wire.Proposal
	p.do(Op{Kind: OpenProposal, Key: key, Action: kms.ActionRotate}, leader, func(ctx context.Context, cl *client.Client) (err error) {
		prop, err = cl.OpenProposal(ctx, wire.OpenProposalRequest{Action: string(kms.ActionRotate), Target: approval.KeyTarget(ring, key), Reason: "planted"})
		return err
	})
	p.w.l.history.mu.Lock() // its id is known only now
	p.w.l.history.ops[len(p.w.l.history.ops)-1].ID = prop.ID
	p.w.l.history.mu.Unlock()
	st, err := p.w.l.custodians[0].Statement(approval.Approve, prop)
	if err != nil {
		p.t.Fatal(err)
	}
	heal := p.cut(leader)
	o := Op{Kind: Vote, Key: key, ID: prop.ID, Custodian: 0, Verdict: approve, Node: leader.ID, Call: p.w.l.history.Now(), Outcome: OK}
	err = p.w.at(leader, func(ctx context.Context, cl *client.Client) error {
		_, err := cl.Vote(ctx, prop.ID, wire.VoteRequest{Statement: st})
		return err
	})
	o.Return = p.w.l.history.Now()
	if err != nil {
		p.t.Fatalf("the leader that is cut off does not acknowledge as planted: %v", err)
	}
	p.w.l.history.Add(o)
	err = harness.Within(p.t.Context(), time.Minute, "another leader", func(ctx context.Context) error {
		return p.w.readProposal(&slot{key: key}, prop.ID, others[0])
	})
	if err != nil {
		p.t.Fatal(err)
	}
	heal()
	if _, err := p.c.SameLog(p.t.Context()); err != nil {
		p.t.Fatal(err)
	}
	if err := p.w.readProposal(&slot{key: key}, prop.ID, others[0]); err != nil {
		p.t.Fatal(err)
	}
}
