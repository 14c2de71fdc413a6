package engine

import (
	"bytes"
	"context"
	"crypto/rand"
	"slices"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
)

// defaultLifetime is that of a proposal whose rule sets no limit.
const defaultLifetime = 24 * time.Hour

// OpenProposal opens a proposal and returns it with the exact bytes that
// custodians sign. Errors: kms.Invalid, kms.NotFound, kms.Conflict (one is open
// already, or the target is not in a state for it), and those of every write.
func (e *Engine) OpenProposal(ctx context.Context, c Caller, q wire.OpenProposalRequest) (wire.Proposal, error) {
	rq := &request{caller: c, act: ActOpenProposal}
	if _, _, err := approval.ParseTarget(q.Target); err == nil {
		rq.about = q.Target
	}
	return do(ctx, e, rq, func(st *state.State) (wire.Proposal, error) {
		var id string
		res, err := e.write(ctx, st, rq, q, func(a attempt) (state.Result, error) {
			p, err := e.newProposal(st, c, q)
			if err != nil {
				return state.Result{}, err
			}
			b := p.Marshal()
			id = approval.ProposalID(b)
			return e.submit(ctx, a, state.OpenProposal{Proposal: b})
		})
		if err != nil {
			return wire.Proposal{}, err
		}
		now := e.cluster.State()
		if res.Duplicate { // the first attempt's bytes count, not this one's
			all := now.Proposals()
			i := slices.IndexFunc(all, func(p state.Proposal) bool { return p.Index == res.Index })
			if i < 0 {
				return wire.Proposal{}, kms.Errorf(kms.NotFound, "the proposal that this idempotency key opened is gone")
			}
			id = all[i].ID
		}
		return e.proposalByID(now, id)
	})
}

// newProposal fills in what the request leaves to the node.
func (e *Engine) newProposal(st *state.State, c Caller, q wire.OpenProposalRequest) (approval.Proposal, error) {
	p := approval.Proposal{
		Format: approval.ProposalFormat, Cluster: st.Cluster(), Nonce: make([]byte, approval.NonceSize),
		Action: kms.Action(q.Action), Target: q.Target, Proposer: c.Identity.String(), Reason: q.Reason,
		Created: e.now().UnixMilli(),
	}
	_, _ = rand.Read(p.Nonce)
	if !q.NotBefore.IsZero() {
		p.NotBefore = q.NotBefore.UnixMilli()
	}
	var err error
	if p.Policy, p.Revision, err = target(st, q.Target); err != nil {
		return p, err
	}
	policy, ok := st.Policy(p.Policy)
	if !ok {
		return p, kms.Errorf(kms.NotFound, "there is no policy %q", p.Policy)
	}
	p.PolicyRevision = policy.Revision
	rule, ok := policy.Rule(p.Action)
	if !ok {
		return p, kms.Errorf(kms.Invalid, "policy %s decides nothing about action %q on %q", p.Policy, q.Action, q.Target)
	}
	life := rule.Lifetime
	if life == 0 {
		life = defaultLifetime.Milliseconds()
	}
	switch {
	case q.ExpiresInMS < 0 || q.ExpiresInMS > life:
		return p, kms.Errorf(kms.Invalid, "expires_in_ms is %d; the rule for %s allows 1 to %d", q.ExpiresInMS, p.Action, life)
	case q.ExpiresInMS > 0:
		life = q.ExpiresInMS
	}
	p.Expires = p.Created + life
	if p.Parameters, err = parameters(p.Action, q.Parameters); err != nil {
		return p, err
	}
	return p, p.Validate()
}

// target returns the policy that decides about a target and the target's present
// revision, 0 for a policy or custodian that is to be added.
func target(st *state.State, s string) (policy string, revision uint64, err error) {
	kind, name, err := approval.ParseTarget(s)
	if err != nil {
		return "", 0, err
	}
	switch kind {
	case approval.TargetKey:
		ring, key, err := kms.SplitKeyPath(name)
		if err != nil {
			return "", 0, err
		}
		kr, ok := st.Keyring(ring)
		if !ok {
			return "", 0, noKeyring(ring)
		}
		k, ok := st.Key(ring, key)
		if !ok {
			return "", 0, noKey(ring, key)
		}
		return kr.Policy, k.Revision, nil
	case approval.TargetPolicy:
		p, _ := st.Policy(name)
		return kms.Governance, p.Revision, nil
	case approval.TargetCustodian:
		c, _ := st.Custodian(name)
		return kms.Governance, c.Revision, nil
	}
	return "", 0, kms.Errorf(kms.Invalid, "target %q is of no known kind", s)
}

// parameters encodes the parameters of an action and refuses those it does not
// have.
func parameters(a kms.Action, p wire.ProposalParameters) ([]byte, error) {
	extra := func(version, rules, custodian bool) error {
		if p.Version != 0 && !version || p.Rules != nil && !rules || p.Custodian != nil && !custodian {
			return kms.Errorf(kms.Invalid, "the parameters are not those of action %q", a)
		}
		return nil
	}
	switch a {
	case kms.ActionDeactivate, kms.ActionCompromise, kms.ActionDestroy:
		return canon.Marshal(approval.VersionParams{Version: p.Version}), extra(true, false, false)
	case kms.ActionPolicy:
		rules := make([]approval.Rule, len(p.Rules))
		for i, r := range p.Rules {
			rules[i] = ruleFromWire(r)
		}
		slices.SortFunc(rules, func(a, b approval.Rule) int { return strings.Compare(string(a.Action), string(b.Action)) })
		return canon.Marshal(approval.PolicyParams{Rules: rules}), extra(false, true, false)
	case kms.ActionCustodian:
		if p.Custodian == nil {
			return nil, kms.Errorf(kms.Invalid, "parameters.custodian is missing")
		}
		return canon.Marshal(approval.CustodianParams{Custodian: custodianFromWire(*p.Custodian)}), extra(false, false, true)
	}
	return nil, extra(false, false, false)
}

func ruleFromWire(r wire.Rule) approval.Rule {
	sorted := func(s []string) []string { return slices.Sorted(slices.Values(s)) }
	return approval.Rule{
		Action: kms.Action(r.Action), Direct: sorted(r.Direct), Approvals: r.Approvals, Sites: r.Sites,
		Required: sorted(r.Required), ProposerMayApprove: r.ProposerMayApprove, Delay: r.DelayMS,
		Lifetime: r.LifetimeMS, Veto: sorted(r.Veto),
	}
}

func custodianFromWire(c wire.Custodian) approval.Custodian {
	out := approval.Custodian{ID: c.ID, Site: c.Site, Revoked: c.Revoked, Revision: c.Revision}
	for _, k := range c.Credentials {
		id := k.ID
		if id == "" {
			id = pqc.Fingerprint(k.PublicKey)
		}
		out.Credentials = append(out.Credentials, approval.Credential{ID: id, Suite: k.Suite, PublicKey: k.PublicKey})
	}
	slices.SortFunc(out.Credentials, func(a, b approval.Credential) int { return strings.Compare(a.ID, b.ID) })
	return out
}

// Vote records a custodian's signed statement on the proposal id. Whoever may
// submit statements may submit anybody's: the signature alone says whose it is.
// Errors: kms.Invalid, kms.NotFound, kms.Denied (revoked, unknown credential),
// kms.BadSignature, kms.Exists (has voted), kms.Expired, kms.Conflict, and those
// of every write.
func (e *Engine) Vote(ctx context.Context, c Caller, id string, q wire.VoteRequest) (wire.Proposal, error) {
	rq := &request{caller: c, act: ActVote, about: aboutProposal(id)}
	return do(ctx, e, rq, func(st *state.State) (wire.Proposal, error) {
		if q.Statement.Proposal != id {
			return wire.Proposal{}, kms.Errorf(kms.Invalid, "the statement is about another proposal than the one addressed")
		}
		p, ok := st.Proposal(id)
		if !ok {
			return wire.Proposal{}, noProposal(id)
		}
		s := approval.Statement{
			Proposal: q.Statement.Proposal, Verdict: approval.Verdict(q.Statement.Verdict),
			Custodian: q.Statement.Custodian, Credential: q.Statement.Credential, Signature: q.Statement.Signature,
		}
		if same(p.Votes, s) { // a repetition, with or without an idempotency key
			return e.proposalByID(st, id)
		}
		_, err := e.write(ctx, st, rq, q, func(a attempt) (state.Result, error) {
			return e.submit(ctx, a, state.CastVote{Statement: s})
		})
		if err != nil {
			return wire.Proposal{}, err
		}
		return e.proposalByID(e.cluster.State(), id)
	})
}

// same reports whether exactly this statement is recorded.
func same(votes []state.Vote, s approval.Statement) bool {
	return slices.ContainsFunc(votes, func(v state.Vote) bool {
		return v.Statement.Custodian == s.Custodian && v.Statement.Verdict == s.Verdict &&
			v.Statement.Credential == s.Credential && bytes.Equal(v.Statement.Signature, s.Signature)
	})
}

func aboutProposal(id string) string {
	if _, err := kms.ParseKeyID(id); err != nil { // the same form: 32 hexadecimal digits
		return "proposal"
	}
	return "proposal/" + id
}

func noProposal(id string) error {
	if len(id) > 32 {
		id = id[:32]
	}
	return kms.Errorf(kms.NotFound, "there is no proposal %q", id)
}

func (e *Engine) proposalByID(st *state.State, id string) (wire.Proposal, error) {
	p, ok := st.Proposal(id)
	if !ok {
		return wire.Proposal{}, noProposal(id)
	}
	return proposalView(st, p)
}
