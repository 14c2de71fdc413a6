package cluster_test

import (
	"os"
	"testing"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/cluster/clustertest"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// history carries commands of every kind to a cluster, each through another node.
type history struct {
	t    *testing.T
	c    *clustertest.Cluster
	turn int
	last state.Result
}

// do signs a command as a node and proposes it at the next running member.
func (h *history) do(node string, cmd state.Command, opts ...statetest.Option) {
	h.t.Helper()
	run := h.c.Running()
	h.turn++
	at := run[h.turn%len(run)]
	opts = append([]statetest.Option{statetest.At(h.c.World.State().Clock())}, opts...)
	h.last = h.c.Propose(at, h.c.World.Command(node, cmd, opts...))
	h.c.World.SetState(h.c.Node(at).State())
}

// rotate makes a keyring of two sites and a key, and rotates the key from
// proposal to the last receipt.
func (h *history) rotate(keyring string) {
	h.t.Helper()
	w := h.c.World
	first := w.FirstNode()
	h.do(first, w.KeyringCommand(keyring, "de", "fr"), statetest.As(w.Operator("de")))
	h.do(first, w.KeyCommand(keyring, "key", kms.Encrypt), statetest.As(w.Operator("de")))
	p := w.Proposal(kms.ActionRotate, approval.KeyTarget(keyring, "key"), nil)
	b := p.Marshal()
	h.do(first, state.OpenProposal{Proposal: b}, statetest.As(p.Proposer))
	id := approval.ProposalID(b)
	for _, custodian := range []string{"de-1", "fr-1", "jp-1"} {
		if _, progress, _ := w.State().Decision(id); progress == string(state.Authorised) {
			break
		}
		h.do(first, state.CastVote{Statement: w.Statement(id, custodian, approval.Approve)})
	}
	k, _ := w.State().Key(keyring, "key")
	h.do(first, w.CommitCommand(id), statetest.Expect(k.Revision))
	for _, node := range w.NodeIDs() {
		for _, r := range w.State().Pending(node) {
			h.do(node, w.ReceiptCommand(node, r.Keyring, r.Key, r.Version))
		}
	}
}

// A whole history goes through the cluster; afterwards a node that lost its
// signatures, and one that was far behind, verify every statement of a snapshot
// and arrive at the state of the others.
func TestHistory(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{Timing: cluster.Timing{TrailingLogs: 1}})
	c.Leader()
	h := &history{t: t, c: c}
	h.rotate("first")
	c.SameState(h.last.Index)
	behind := c.Follower()
	c.Kill(behind)
	h.rotate("second")
	c.WaitApplied(h.last.Index)
	for _, i := range c.Running() {
		if err := c.Node(i).TakeSnapshot(); err != nil {
			t.Fatal(err)
		}
	}
	c.Restart(behind)
	c.SameState(h.last.Index)

	again := c.Follower()
	trust := c.Node(again).TrustDir()
	c.Kill(again)
	if err := os.RemoveAll(trust); err != nil {
		t.Fatal(err)
	}
	c.Restart(again)
	h.rotate("third")
	c.SameState(h.last.Index)
	for i := range c.Members {
		for _, keyring := range []string{"first", "second", "third"} {
			if k, ok := c.Node(i).State().Key(keyring, "key"); !ok || k.Primary != 2 {
				t.Errorf("node %d: key %s has primary version %d", i, keyring, k.Primary)
			}
		}
	}
}
