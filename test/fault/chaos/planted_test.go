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

// TestPlantedBugs runs a product with both faults. A follower that is cut off shows what
// is no longer so; a leader that is cut off takes a vote that is then gone.
func TestPlantedBugs(t *testing.T) {
	bin := need(t)
	c, err := harness.Found(t.Context(), bin.Binaries, t.TempDir(), harness.Plan{
		Nodes: map[string]int{"fr": 1, "de": 1, "jp": 1}, Cluster: map[string]any{"heartbeat": "1s"},
		Program: map[string]string{"fr-1": bin.changed, "de-1": bin.changed, "jp-1": bin.changed},
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range c.Nodes {
		if err := os.WriteFile(filepath.Join(n.Dir, plantedFile), nil, 0o600); err != nil {
			t.Fatal(err)
		}
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
	p.honest("honest")
	v := Check(load.history.All(), time.Minute, os.Getenv("CONCLAVE_FAULT_DIR"))
	for key, planted := range map[string]bool{"stale": true, "lost": true, "honest": false} {
		if found := slices.ContainsFunc(v.Violations, func(s string) bool { return strings.HasPrefix(s, key+":") }); found && !planted {
			t.Errorf("a violation where nothing was broken: %q", v.Violations)
		} else if planted && !found {
			t.Errorf("the planted bug is not found in the history of the key %q; violations: %q", key, v.Violations)
		}
	}
}

// honest makes and reads a key while nothing is broken: no violation is to be found there.
func (p planted) honest(key string) {
	p.t.Helper()
	leader, others := p.split()
	p.create(key, leader)
	if _, err := p.c.SameLog(p.t.Context()); err != nil {
		p.t.Fatal(err)
	}
	if err := p.w.readKey(&slot{key: key}, others[0]); err != nil {
		p.t.Fatal(err)
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
