package state

import (
	"bytes"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
)

// RuleFor returns the rule that decides a proposal under the policies in force:
// the rule of the named policy for the action. To change a policy takes the
// stricter of the old and the new rule for the action policy, and besides it the
// approvals, sites, required sites, groups and vetoes of every quorum rule that changes,
// before and after: otherwise a small quorum could lower a large one first. To add
// or replace a custodian takes those of every quorum rule there is: otherwise a
// small quorum could make the custodians that a large one lacks. To revoke one, or to
// restore credentials that were suspended and nothing else, takes the rule alone: what
// is restored was enrolled so once, and a thief who has suspended all others of a site
// must not be able to hold it up. site returns the site of a node: to let a node join, to promote
// it or to replace its
// hardware root takes, besides the rule, an approval of its own site, whose keys the
// new root will open; to remove one takes the rule alone. enrolled reports whether a site has or had a custodian: to add
// or replace one of such a site takes an approval of that site too, or else others
// could make the approval that the site's nodes take. Errors: kms.NotFound,
// kms.Conflict when the policy has another revision than the proposal names or the
// change cannot be made in one step, kms.Invalid.
func RuleFor(policies []approval.Policy, site func(node string) (string, bool), enrolled func(site string) bool, p approval.Proposal) (approval.Rule, error) {
	policy := func(name string) (approval.Policy, bool) {
		return search(policies, func(x approval.Policy) bool { return x.Name == name })
	}
	if slices.Contains(kms.GovernanceActions, p.Action) != (p.Policy == kms.Governance) {
		return approval.Rule{}, kms.Errorf(kms.Invalid, "policy %s does not decide %q", p.Policy, p.Action)
	}
	pol, ok := policy(p.Policy)
	if !ok {
		return approval.Rule{}, kms.Errorf(kms.NotFound, "there is no policy %s", p.Policy)
	}
	if pol.Revision != p.PolicyRevision {
		return approval.Rule{}, kms.Errorf(kms.Conflict, "policy %s is at revision %d; the proposal is made under revision %d", p.Policy, pol.Revision, p.PolicyRevision)
	}
	rule, ok := pol.Rule(p.Action)
	if !ok {
		return approval.Rule{}, kms.Errorf(kms.Invalid, "policy %s has no rule for %q", p.Policy, p.Action)
	}
	switch p.Action {
	case kms.ActionPolicy:
		return rulePolicyChange(policy, rule, p)
	case kms.ActionCustodian:
		return ruleCustodianChange(policies, enrolled, rule, p)
	case kms.ActionNode:
		return ruleNodeChange(rule, site, p)
	case kms.ActionSite:
		return ruleSiteChange(rule, enrolled, p)
	case kms.ActionRecoveryKey:
		return ruleRecoveryKey(rule, p)
	}
	return rule, nil
}

// ruleNodeChange adds the node's own site to the sites that must approve: what joins,
// and the root that it comes with, will open every keyring of that site, and a voter
// counts for it. A removal takes the rule alone: it gives nobody anything, and a site
// that has turned hostile must not be able to hold it up.
func ruleNodeChange(rule approval.Rule, site func(node string) (string, bool), p approval.Proposal) (approval.Rule, error) {
	_, node, err := approval.ParseTarget(p.Target)
	if err != nil {
		return rule, err
	}
	params, err := p.NodeParams()
	if err != nil {
		return rule, err
	}
	switch params.Change {
	case approval.NodeRemove:
		return rule, nil
	case approval.NodeJoin:
		return withSite(rule, params.Site), nil
	}
	own, ok := site(node)
	if !ok {
		return rule, kms.Errorf(kms.NotFound, "there is no node %s", node)
	}
	return withSite(rule, own), nil
}

// ruleSiteChange adds the site itself where its CAs change and it has or had a
// custodian: who is in the bundle speaks for everybody of that site.
func ruleSiteChange(rule approval.Rule, enrolled func(site string) bool, p approval.Proposal) (approval.Rule, error) {
	_, site, err := approval.ParseTarget(p.Target)
	if err != nil {
		return rule, err
	}
	params, err := p.SiteParams()
	if err != nil || params.Change != approval.SiteCAs || !enrolled(site) {
		return rule, err
	}
	return withSite(rule, site), nil
}

// ruleRecoveryKey adds every site of the residency to the sites that must approve, for
// the key will open what is theirs, and asks for two sites whatever the rule says.
func ruleRecoveryKey(rule approval.Rule, p approval.Proposal) (approval.Rule, error) {
	params, err := p.RecoveryParams()
	if err != nil {
		return rule, err
	}
	rule = atLeast(rule, approval.Rule{Approvals: 2, Sites: 2, ProposerMayApprove: true})
	for _, site := range params.Residency {
		rule = withSite(rule, site)
	}
	return rule, nil
}

// withSite adds a site to those that must approve.
func withSite(rule approval.Rule, site string) approval.Rule {
	return atLeast(rule, approval.Rule{Approvals: 1, Sites: 1, Required: []string{site}, ProposerMayApprove: true})
}

// ruleCustodianChange makes the rule for a custodian at least as strict as any
// that the custodian's approvals will count under: those of the policies, and for
// the site's nodes that of ruleNodeChange.
func ruleCustodianChange(policies []approval.Policy, enrolled func(site string) bool, rule approval.Rule, p approval.Proposal) (approval.Rule, error) {
	params, err := p.CustodianParams()
	if err != nil || params.Custodian.Revoked || len(params.Restore) > 0 {
		return rule, err
	}
	for _, pol := range policies {
		for _, r := range pol.Rules {
			rule = atLeast(rule, r)
		}
	}
	if enrolled(params.Custodian.Site) {
		rule = withSite(rule, params.Custodian.Site)
	}
	if err := rule.Validate(); err != nil {
		return rule, kms.Errorf(kms.Conflict, "custodian %s cannot be changed under the policies in force: %v", params.Custodian.ID, err)
	}
	return rule, nil
}

func rulePolicyChange(policy func(string) (approval.Policy, bool), rule approval.Rule, p approval.Proposal) (approval.Rule, error) {
	_, name, err := approval.ParseTarget(p.Target)
	if err != nil {
		return rule, err
	}
	params, err := p.PolicyParams()
	if err != nil {
		return rule, err
	}
	next := approval.Policy{Name: name, Rules: params.Rules}
	if name == kms.Governance {
		if r, ok := next.Rule(kms.ActionPolicy); ok {
			rule = rule.Stricter(r)
		}
	}
	old, exists := policy(name)
	if exists {
		// What is asked of hardware and suites bears on every action.
		same := old.Attested == params.Attested && slices.Equal(old.Forbid, params.Forbid)
		for _, a := range slices.Concat(kms.KeyActions, kms.GovernanceActions) {
			before, had := old.Rule(a)
			after, has := next.Rule(a)
			if same && had && has && bytes.Equal(canon.Marshal(before), canon.Marshal(after)) {
				continue
			}
			rule = atLeast(atLeast(rule, before), after)
		}
	}
	if err := rule.Validate(); err != nil {
		return rule, kms.Errorf(kms.Conflict, "policy %s cannot be changed so in one step: %v", name, err)
	}
	return rule, nil
}

// atLeast returns the rule with the thresholds, groups and vetoes of other besides its own, where that is a
// quorum. Its times stay: a delay of other's could outlast the rule's lifetime.
func atLeast(rule, other approval.Rule) approval.Rule {
	if !other.Quorum() {
		return rule
	}
	return rule.Stricter(approval.Rule{
		Action: rule.Action, Approvals: other.Approvals, Sites: other.Sites, Required: other.Required,
		ProposerMayApprove: other.ProposerMayApprove, Veto: other.Veto, Need: other.Need, Lifetime: rule.Lifetime,
	})
}

// rule returns the rule in force for a proposal, and checks that its policy is the
// one that decides its target.
func (r reader) rule(p approval.Proposal) (approval.Rule, error) {
	kind, name, err := approval.ParseTarget(p.Target)
	if err != nil {
		return approval.Rule{}, err
	}
	if kind == approval.TargetKey || kind == approval.TargetKeyring {
		ring := name
		if kind == approval.TargetKey {
			if ring, _, err = kms.SplitKeyPath(name); err != nil {
				return approval.Rule{}, err
			}
		}
		k, ok := r.keyring(ring)
		if !ok {
			return approval.Rule{}, kms.Errorf(kms.NotFound, "there is no keyring %s", ring)
		}
		if k.Policy != p.Policy {
			return approval.Rule{}, kms.Errorf(kms.Conflict, "keyring %s is under policy %s, not %s", ring, k.Policy, p.Policy)
		}
	}
	return RuleFor(r.policies(), r.siteOf, r.enrolled, p)
}

// enrolled reports whether a site has or had a custodian.
func (r reader) enrolled(site string) bool {
	return slices.ContainsFunc(r.custodians(), func(c approval.Custodian) bool { return c.Site == site })
}

// decide counts approvals; a direct rule is met when the proposer has the role.
func (r reader) decide(p Proposal, rule approval.Rule, approvals []string) approval.Decision {
	if len(rule.Direct) == 0 {
		return rule.Decide(p.Content.Proposer, r.custodian, approvals)
	}
	if err := r.mayAct(p.Content.Proposer, rule); err != nil {
		return approval.Decision{Missing: []string{"a proposer with a role that the policy lists"}}
	}
	return approval.Decision{Met: true}
}

// counts reports whether a vote still counts.
func (r reader) counts(v Vote) bool {
	c, ok := r.custodian(v.Statement.Custodian)
	return ok && c.Active(v.Statement.Credential)
}

// approvers returns the custodians whose approvals count.
func approvers(r reader, p Proposal) []string {
	var ids []string
	for _, v := range p.Votes {
		if v.Statement.Verdict == approval.Approve && r.counts(v) {
			ids = append(ids, v.Statement.Custodian)
		}
	}
	return ids
}

// suspended reports whether a vote does not count for now: a quorum may restore its
// credential.
func (r reader) suspended(v Vote) bool {
	c, ok := r.custodian(v.Statement.Custodian)
	return ok && !r.counts(v) && c.Restored().Active(v.Statement.Credential)
}

// possible returns the custodians who have not rejected the proposal, but for one whose
// credential is suspended.
func (r reader) possible(p Proposal) []string {
	var ids []string
	for _, c := range r.custodians() {
		rejected := slices.ContainsFunc(p.Votes, func(v Vote) bool {
			return v.Statement.Custodian == c.ID && v.Statement.Verdict == approval.Reject && !r.suspended(v)
		})
		if !rejected {
			ids = append(ids, c.ID)
		}
	}
	return ids
}

// authorisedAt returns when the votes that count first met the rule, 0 if they do
// not. It depends on the votes alone and not on what was decided before.
func (r reader) authorisedAt(p Proposal, rule approval.Rule) int64 {
	if r.decide(p, rule, nil).Met {
		return p.Opened
	}
	for i, v := range p.Votes {
		q := p
		q.Votes = p.Votes[:i+1]
		if r.decide(q, rule, approvers(r, q)).Met {
			return v.Time
		}
	}
	return 0
}

// rejected reports whether the votes end the proposal: by a veto, by anybody's
// rejection of a destruction, or because those left cannot meet the rule.
func (r reader) rejected(p Proposal, rule approval.Rule) bool {
	for _, v := range p.Votes {
		if v.Statement.Verdict != approval.Reject || !r.counts(v) {
			continue
		}
		if p.Content.Action == kms.ActionDestroy || slices.Contains(rule.Veto, v.Statement.Custodian) {
			return true
		}
	}
	return !r.decide(p, rule, r.possible(p)).Met
}

// settle decides where a live proposal stands after its votes or the custodians
// have changed, and stores it.
func (t *tx) settle(p Proposal) {
	r := t.reader()
	rule, err := r.rule(p.Content)
	if err != nil {
		t.void(p)
		return
	}
	before := p.Progress
	p.AuthorisedAt = r.authorisedAt(p, rule)
	switch {
	case r.rejected(p, rule):
		p.Progress, p.ClosedAt = Rejected, t.clock
		t.event(t.proposalEvent(EventProposalRejected, p))
	case p.AuthorisedAt > 0:
		p.Progress = Authorised
		if before != Authorised {
			t.event(t.proposalEvent(EventProposalAuthorised, p))
		}
	default:
		p.Progress = Open
		if before == Authorised {
			t.event(t.proposalEvent(EventProposalReopened, p))
		}
	}
	insert(t.Txn, tableProposal, p)
}

func (t *tx) void(p Proposal) {
	p.Progress, p.ClosedAt = Void, t.clock
	insert(t.Txn, tableProposal, p)
	t.event(t.proposalEvent(EventProposalVoid, p))
}

// voidTarget ends the live proposals about a target that has changed.
func (t *tx) voidTarget(target string) {
	for _, p := range list[Proposal](t.Txn, tableProposal, byTarget, prefixKey(target)) {
		if p.live() {
			t.void(p)
		}
	}
}

func nodeTarget(n Node) string { return approval.NodeTarget(n.ID) }

func keyTarget(k Key) string { return approval.KeyTarget(k.Keyring, k.Name) }
