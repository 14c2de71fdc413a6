package state_test

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// walk changes the members of a cluster at random.
type walk struct {
	t       *testing.T
	w       *statetest.World
	r       *rand.Rand
	names   int
	applied map[string]int // what was carried out, by change
}

// TestMembersWalk changes members at random and holds the invariants after each step;
// in the end the state must follow from its statements.
func TestMembersWalk(t *testing.T) {
	t.Parallel()
	done := map[string]int{}
	for seed := range uint64(4) {
		x := &walk{t: t, w: populated(t), r: rand.New(rand.NewPCG(seed, 1)), applied: done}
		for range 60 {
			x.step()
			x.check()
		}
		restoreBoth(t, x.w.State())
		if t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
	for _, what := range []string{"join", "promote", "remove", "adopt", "confirm"} {
		if done[what] < 4 {
			t.Errorf("%s happened %d times", what, done[what])
		}
	}
}

func (x *walk) step() {
	s := x.w.State()
	site := []string{"de", "fr", "jp"}[x.r.IntN(3)]
	some := s.Nodes()[x.r.IntN(len(s.Nodes()))]
	switch x.r.IntN(10) {
	case 0, 1:
		x.names++
		id := fmt.Sprintf("node-%s-%d", site, 100+x.names)
		_, params := x.w.JoinParams(id, site, false)
		x.carry("join", id, params)
	case 2, 3:
		for _, n := range s.Nodes() { // most of the time one that may be
			if !n.Voter && n.Root != 0 && x.r.IntN(4) > 0 {
				some = n
			}
		}
		x.w.Advance(time.Second)
		x.carry("promote", some.ID, approval.NodeParams{Change: approval.NodePromote})
	case 4:
		x.carry("remove", some.ID, approval.NodeParams{Change: approval.NodeRemove})
	case 5, 8, 9:
		if _, pending := s.PendingMembers(); pending {
			x.w.Do(x.speaker(), x.w.ConfirmCommand())
			x.applied["confirm"]++
		}
	case 6:
		for _, next := range s.Replacements() {
			x.w.Reseal(next.Node)
			x.w.Do(next.Node, x.w.AdoptCommand(next.Node))
			x.applied["adopt"]++
		}
		x.w.Announce()
	case 7:
		x.w.Advance(time.Duration(1+x.r.IntN(90)) * time.Second)
	}
}

// speaker is a node that can sign.
func (x *walk) speaker() string { return x.w.NodeIDs()[0] }

// carry proposes a change and carries it out, unless it is refused with a reason that
// the state gives.
func (x *walk) carry(what, node string, params approval.NodeParams) {
	x.t.Helper()
	p := x.w.Proposal(kms.ActionNode, approval.NodeTarget(node), params)
	by := x.speaker()
	r := x.w.Apply(x.w.Command(by, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer)))
	switch r.Kind {
	case 0:
	case kms.Conflict, kms.Exists, kms.Unavailable:
		return
	default:
		x.t.Fatalf("%s %s: %v", what, node, r.Err())
	}
	id := approval.ProposalID(p.Marshal())
	for _, c := range []string{"de-1", "fr-1", "jp-1"} {
		x.w.Do(by, state.CastVote{Statement: x.w.Statement(id, c, approval.Approve)})
		if now, _ := x.w.State().Proposal(id); now.Progress == state.Authorised {
			break
		}
	}
	x.w.Do(by, state.Execute{Proposal: id}, statetest.Expect(p.Revision))
	x.applied[what]++
}

func (x *walk) check() {
	x.t.Helper()
	s := x.w.State()
	voters, total := map[string]int{}, 0
	for _, n := range s.Nodes() {
		if s.Removed(n.ID) {
			x.t.Fatalf("node %s was removed and is there", n.ID)
		}
		if n.Voter {
			voters[n.Site]++
			total++
		}
		if n.Voter && n.Root == 0 || s.Resident("coalition", n.ID) != (n.Root != 0) {
			x.t.Fatalf("node %+v", n)
		}
	}
	for site, n := range voters {
		if 2*n > total {
			x.t.Fatalf("site %s has %d of %d voters", site, n, total)
		}
	}
	if total == 0 {
		x.t.Fatal("nobody votes")
	}
	if before, pending := s.PendingMembers(); pending {
		after := s.Members()
		differ := func(a, b []state.Member) (n int) {
			for _, m := range a {
				if !slices.Contains(b, m) {
					n++
				}
			}
			return n
		}
		if a, b := differ(after, before), differ(before, after); max(a, b) != 1 {
			x.t.Fatalf("the change at hand is of more than one server: %v to %v", before, after)
		}
	}
	for _, kek := range s.KEKs("coalition") {
		for _, c := range kek.Copies {
			if _, there := s.Node(c.Node); !there {
				x.t.Fatalf("a copy for %s, which is no member", c.Node)
			}
		}
	}
}
