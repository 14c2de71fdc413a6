package state_test

import (
	"bytes"
	"slices"
	"testing"

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
	ring := rapid.SampledFrom([]string{"ring", "vault"}).Draw(t, "ring")
	target := approval.KeyTarget(ring, name)
	version := uint32(rapid.IntRange(1, 3).Draw(t, "version"))
	switch rapid.IntRange(0, 23).Draw(t, "command") {
	case 22:
		pair := rapid.SampledFrom([][2]string{{"fr-2", "fr-1"}, {"fr-1", "fr-2"}, {"jp-2", "jp-1"}, {"de-1", "fr-1"}}).Draw(t, "suspend")
		return w.Command(node, state.SuspendCredential{Statement: w.Suspension(pair[0], pair[1])}, now(s))
	case 18, 19, 20:
		return a.rotateKEK(t, node)
	case 17:
		return w.Command(node, w.UseCommand(ring, name, version, s.Clock()), now(s))
	case 0:
		ahead := rapid.SampledFrom([]int64{-700_000, 1000, 1000, 60_000, 8 * 24 * 3600_000}).Draw(t, "ahead")
		return w.Command(node, state.Tick{}, statetest.At(s.Clock()+ahead))
	case 1:
		purpose := map[string]kms.Purpose{"a": kms.Encrypt, "b": kms.Sign}[name]
		return w.Command(node, w.KeyCommand(ring, name, purpose), op, now(s))
	case 2, 3:
		return a.propose(t, node, target, version)
	case 4:
		return a.vote(t, node)
	case 5, 6, 7, 8, 9:
		return a.push(t, node)
	case 10:
		return w.Command(node, w.ReceiptCommand(node, ring, name, version), now(s))
	case 13, 14:
		return a.reseal(t, node, state.Pending{Keyring: ring, Key: name, Version: version})
	case 21:
		return a.checkpoint(t, node)
	case 16:
		return a.refuse(t, node)
	case 15:
		return w.Command(node, w.AdoptCommand(node), now(s))
	case 11, 12:
		if owed := s.Pending(node); len(owed) > 0 {
			p := owed[len(owed)-1]
			return w.Command(node, w.ReceiptCommand(node, p.Keyring, p.Key, p.Version), now(s))
		}
	}
	return a.spoil(t)
}

// checkpoint is about checkpoints: keys for them, new ones, cosignatures, and an access log
// that does not continue what it was.
func (a *actor) checkpoint(t *rapid.T, node string) []byte {
	w, s := a.w, a.w.State()
	if _, ok := s.Witness(node); !ok {
		return w.Command(node, w.RegisterCommand(node), now(s))
	}
	other := rapid.SampledFrom(append(w.NodeIDs(), "")).Draw(t, "log")
	_, submitted := s.Checkpoint(other)
	switch what := rapid.IntRange(0, 9).Draw(t, "checkpoint"); {
	case what == 0:
		return w.Command(node, w.RegisterCommand(node), now(s))
	case what == 1 && w.AccessLog(node).Size() > 1:
		return w.Command(node, w.CheckpointCommand(node, w.AccessLog(node).Fork(1)), now(s))
	case what < 5 || other != "" && !submitted:
		return w.Command(node, w.CheckpointCommand(node, w.Grow(node, what)), now(s))
	}
	return w.Command(node, w.CosignCommand(node, other), now(s))
}

// now signs at the cluster's time.
func now(s *state.State) statetest.Option { return statetest.At(s.Clock()) }

// push does what brings a replacement or the newest live proposal on: an approval by somebody who
// has not voted, or its execution.
func (a *actor) push(t *rapid.T, node string) []byte {
	s := a.w.State()
	if next := s.Replacements(); len(next) > 0 && rapid.Bool().Draw(t, "reseal") {
		return a.reseal(t, node, state.Pending{})
	}
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
	if p.Content.Target == approval.KeyringTarget("ring") {
		return a.w.Command(node, a.w.CommitKEKCommand(p.ID), expect, now(a.w.State()))
	}
	if p.Content.Action == kms.ActionRotate {
		return a.w.Command(node, a.w.CommitCommand(p.ID), expect, now(a.w.State()))
	}
	return a.w.Command(node, state.Execute{Proposal: p.ID}, expect, now(a.w.State()))
}

func (a *actor) propose(t *rapid.T, node, target string, version uint32) []byte {
	w := a.w
	action := rapid.SampledFrom(append([]kms.Action{kms.ActionPolicy, kms.ActionCustodian, kms.ActionNode, kms.ActionNode, kms.ActionNode, kms.ActionNode}, kms.KeyActions[1:]...)).Draw(t, "action")
	var params any
	switch action {
	case kms.ActionActivate, kms.ActionDeactivate, kms.ActionCompromise:
		params = approval.VersionParams{Version: version}
	case kms.ActionSchedule:
		params = approval.ScheduleParams{RotationPeriod: int64(version) * 3600_000}
	case kms.ActionDestroy:
		params = approval.VersionParams{Version: version - 1}
	case kms.ActionPolicy:
		target = "policy/standard"
		rules := statetest.Policies(3)[1].Rules
		rules[5].Delay = int64(version) * 1000
		if rapid.Bool().Draw(t, "activate") {
			rules = append(withActivate().Rules[:1:1], rules...)
			rules = withRule(rules, kms.ActionSchedule)
		}
		params = approval.PolicyParams{Rules: rules}
	case kms.ActionCustodian:
		target = "custodian/jp-2"
		c := statetest.Record("jp-2", "jp", 0, w.Custodian("jp-2"))
		c.Revoked = rapid.Bool().Draw(t, "revoked")
		params = approval.CustodianParams{Custodian: c}
	}
	if action == kms.ActionNode {
		target = approval.NodeTarget(node)
		params = w.NodeParams(node, w.NewRoot(node), rapid.IntRange(0, 3).Draw(t, "leave") == 0)
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

// reseal brings a replacement on, or sends a copy that may be for nobody.
func (a *actor) reseal(t *rapid.T, node string, some state.Pending) []byte {
	w, s := a.w, a.w.State()
	all := s.Replacements()
	if len(all) == 0 {
		c := w.ResealCommand("node-fr-1", some)
		c.Root = 2
		return w.Command(node, c, now(s))
	}
	next := rapid.SampledFrom(all).Draw(t, "replacement")
	if lacks := s.Unsealed(next.Node); len(lacks) > 0 {
		p := rapid.SampledFrom(lacks).Draw(t, "unsealed")
		return w.Command(w.NextResealer(next.Node, p), w.ResealCommand(next.Node, p), now(s))
	}
	if rapid.IntRange(0, 3).Draw(t, "refuse") == 0 {
		return a.refuse(t, next.Node)
	}
	return w.Command(next.Node, w.AdoptCommand(next.Node), now(s))
}

// refuse refuses a copy that the node has for its next root, or would not have.
func (a *actor) refuse(t *rapid.T, node string) []byte {
	w, s := a.w, a.w.State()
	copies := slices.DeleteFunc(s.Adoption(node), func(c state.AdoptedCopy) bool {
		// One KEK is refused once, so that the check of all copies of it holds.
		return c.Key == "" && slices.ContainsFunc(s.Refused(node), func(x state.RefusedCopy) bool { return x.Key == "" })
	})
	if len(copies) == 0 {
		return a.spoil(t)
	}
	c := rapid.SampledFrom(copies).Draw(t, "refused")
	by := rapid.SampledFrom(w.NodeIDs()).Draw(t, "by")
	return w.Command(node, w.RefuseCommand(node, state.Pending{Keyring: c.Keyring, Key: c.Key, Version: c.Version}, by), now(s))
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

// start returns a fresh cluster with a keyring of each protection and the log that
// made it.
func start(t testing.TB) (*actor, *state.State) {
	w := statetest.New(t, statetest.Options{})
	first := w.State()
	a := &actor{w: w}
	for _, id := range w.NodeIDs() {
		news, _ := w.State().News(id, state.Program("test"))
		a.log = append(a.log, w.Command(id, news))
		w.Apply(a.log[len(a.log)-1])
	}
	a.log = append(a.log, w.Command("node-fr-1", w.KeyringCommand("ring", "fr", "de", "jp"), statetest.As(w.Operator("fr"))))
	w.Apply(a.log[len(a.log)-1])
	a.log = append(a.log, w.Command("node-fr-1", w.HardwareKeyringCommand("vault", "fr", "de", "jp"), statetest.As(w.Operator("fr"))))
	w.Apply(a.log[len(a.log)-1])
	return a, first
}
