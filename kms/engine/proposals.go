package engine

import (
	"bytes"
	"cmp"
	"context"
	"crypto/rand"
	"reflect"
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
			p, ok := now.ProposalOpenedAt(res.Index)
			if !ok {
				return wire.Proposal{}, kms.Errorf(kms.NotFound, "the proposal that this idempotency key opened is gone")
			}
			id = p.ID
		}
		return e.proposalByID(now, id)
	})
}

// newProposal fills in what the request leaves to the node.
func (e *Engine) newProposal(st *state.State, c Caller, q wire.OpenProposalRequest) (approval.Proposal, error) {
	p := approval.Proposal{
		Format: approval.ProposalFormat, Cluster: st.Lineage(), Nonce: make([]byte, approval.NonceSize),
		Action: kms.Action(q.Action), Target: q.Target, Proposer: c.Identity.String(), Reason: q.Reason,
		Created: e.now().UnixMilli(),
	}
	_, _ = rand.Read(p.Nonce)
	if !q.NotBefore.IsZero() {
		p.NotBefore = q.NotBefore.UnixMilli()
	}
	var err error
	if p.Policy, p.Revision, err = target(st, p.Action, q.Target); err != nil {
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
	if p.Parameters, err = parameters(st, p, q.Parameters); err != nil {
		return p, err
	}
	return p, p.Validate()
}

// target returns the policy that decides about a target and the target's present
// revision, 0 for a policy, custodian, node or site that is to be added, and for a key
// that is to be imported.
func target(st *state.State, action kms.Action, s string) (policy string, revision uint64, err error) {
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
		switch {
		case ok && action == kms.ActionImport:
			return "", 0, kms.Errorf(kms.Exists, "there is a key %q in keyring %q already", key, ring)
		case !ok && action != kms.ActionImport:
			return "", 0, noKey(ring, key)
		}
		return kr.Policy, k.Revision, nil
	case approval.TargetKeyring:
		kr, ok := st.Keyring(name)
		if !ok {
			return "", 0, noKeyring(name)
		}
		return kr.Policy, kr.Revision, nil
	case approval.TargetPolicy:
		p, _ := st.Policy(name)
		return kms.Governance, p.Revision, nil
	case approval.TargetCustodian:
		c, _ := st.Custodian(name)
		return kms.Governance, c.Revision, nil
	case approval.TargetNode:
		n, _ := st.Node(name)
		return kms.Governance, n.Revision, nil
	case approval.TargetSite:
		return kms.Governance, st.SiteRevision(name), nil
	case approval.TargetRecovery:
		k, _ := st.RecoveryKeyOf(name)
		return kms.Governance, k.Number, nil
	}
	return "", 0, kms.Errorf(kms.Invalid, "target %q is of no known kind", s)
}

// parameters encodes the parameters of a proposal's action and refuses those that
// the action does not have.
func parameters(st *state.State, p approval.Proposal, q wire.ProposalParameters) ([]byte, error) {
	var only wire.ProposalParameters // what the action may have
	var encoded []byte
	switch p.Action {
	case kms.ActionActivate, kms.ActionDeactivate, kms.ActionCompromise, kms.ActionDestroy:
		only.Version, only.Override = q.Version, q.Override
		encoded = canon.Marshal(approval.VersionParams{Version: q.Version, Override: q.Override})
	case kms.ActionSchedule:
		if q.RotationPeriodMS == nil {
			return nil, kms.Errorf(kms.Invalid, "parameters.rotation_period_ms is missing")
		}
		only.RotationPeriodMS = q.RotationPeriodMS
		encoded = canon.Marshal(approval.ScheduleParams{RotationPeriod: *q.RotationPeriodMS})
	case kms.ActionPolicy:
		only.Rules, only.Attested, only.Forbid = q.Rules, q.Attested, q.Forbid
		params, err := policyParams(st, p, q)
		if err != nil {
			return nil, err
		}
		encoded = canon.Marshal(params)
	case kms.ActionCustodian:
		if q.Custodian == nil {
			return nil, kms.Errorf(kms.Invalid, "parameters.custodian is missing")
		}
		only.Custodian, only.Possession, only.Restore = q.Custodian, q.Possession, q.Restore
		encoded = canon.Marshal(custodianParams(q))
	case kms.ActionNode:
		if q.Node == nil {
			return nil, kms.Errorf(kms.Invalid, "parameters.node is missing")
		}
		only.Node = q.Node
		encoded = canon.Marshal(nextRootFromWire(*q.Node))
	case kms.ActionSite:
		if q.Site == nil {
			return nil, kms.Errorf(kms.Invalid, "parameters.site is missing")
		}
		only.Site = q.Site
		encoded = canon.Marshal(approval.SiteParams{Change: approval.SiteChange(q.Site.Change), TrustDomain: q.Site.TrustDomain, CAs: q.Site.CAs})
	}
	if p.Action == kms.ActionImport {
		if q.Import == nil {
			return nil, kms.Errorf(kms.Invalid, "parameters.import is missing")
		}
		only.Import = q.Import
		encoded = canon.Marshal(importFromWire(*q.Import))
	}
	if p.Action == kms.ActionRecoveryKey {
		only.Recovery, encoded = q.Recovery, q.Recovery
	}
	if !reflect.DeepEqual(q, only) {
		return nil, kms.Errorf(kms.Invalid, "the parameters are not those of action %q", p.Action)
	}
	return encoded, nil
}

// policyParams are the parameters of the action policy. Whether the hardware must
// be attested, and which suites are forbidden, stays as it is where the request says
// nothing.
func policyParams(st *state.State, p approval.Proposal, q wire.ProposalParameters) (approval.PolicyParams, error) {
	rules := make([]approval.Rule, len(q.Rules))
	for i, r := range q.Rules {
		rules[i] = RuleFromWire(r)
	}
	slices.SortFunc(rules, func(a, b approval.Rule) int { return strings.Compare(string(a.Action), string(b.Action)) })
	params := approval.PolicyParams{Rules: rules}
	if _, name, err := approval.ParseTarget(p.Target); err == nil {
		now, _ := st.Policy(name)
		params.Attested, params.Forbid = now.Attested, now.Forbid
	}
	if q.Attested != nil {
		params.Attested = *q.Attested
	}
	var err error
	if q.Forbid != nil {
		params.Forbid, err = SuitesFromWire(q.Forbid)
	}
	return params, err
}

func nextRootFromWire(n wire.NextRoot) approval.NodeParams {
	r := n.Root
	return approval.NodeParams{
		Change: approval.NodeChange(cmp.Or(n.Change, string(approval.NodeReplaceRoot))),
		Site:   n.Site, Address: n.Address, API: n.API,
		Root: approval.NodeRoot{
			Suite: r.Suite, Agreement: r.Agreement, SigningSuite: r.SigningSuite, Signing: r.Signing, Device: r.Device,
			ImportKind: r.ImportKind, Import: r.Import, Attestation: r.Attestation,
		},
		Possession: n.Possession, Leave: n.Leave,
	}
}

func importFromWire(i wire.ImportedKey) approval.ImportParams {
	return approval.ImportParams{Node: i.Node, Purpose: kms.Purpose(i.Purpose), Algorithm: kms.Algorithm(i.Algorithm),
		RotationPeriod: i.RotationPeriodMS, PublicKey: i.PublicKey, Sealed: i.Sealed}
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
