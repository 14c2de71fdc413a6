package state

import (
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

// live reports whether the proposal is open or authorised; it may be expired.
func (p Proposal) live() bool { return p.Progress == Open || p.Progress == Authorised }

// expired reports whether it is too late at the given time.
func (p Proposal) expired(clock int64) bool { return clock >= p.Content.Expires }

// executable returns the time from which an authorised proposal may be carried out.
func (p Proposal) executable(rule approval.Rule) int64 {
	return max(p.Content.NotBefore, rule.NotBefore, p.AuthorisedAt+rule.Delay)
}

func checkProposalID(id string) error {
	ok := len(id) == 32
	for _, c := range []byte(id) {
		ok = ok && (c >= '0' && c <= '9' || c >= 'a' && c <= 'f')
	}
	if !ok {
		return kms.Errorf(kms.Invalid, "the proposal id is not 32 hexadecimal digits")
	}
	return nil
}

func (c OpenProposal) validate(e Envelope) error {
	if _, err := approval.ParseProposal(c.Proposal); err != nil {
		return err
	}
	return noExpect(e)
}

// verify checks the proof of possession of a node's new root.
func (c OpenProposal) verify(t *tx) error {
	content, err := approval.ParseProposal(c.Proposal)
	if err != nil {
		return err
	}
	if err := t.knowsCredentials(content); err != nil {
		return err
	}
	if err := t.verifyRecovery(content); err != nil {
		return err
	}
	return t.verifyRoot(content)
}

func (c OpenProposal) apply(t *tx) error {
	content, err := approval.ParseProposal(c.Proposal)
	if err != nil {
		return err
	}
	if err := t.knowsKEKRotation(content.Target); err != nil {
		return err
	}
	if err := t.knowsContent(content); err != nil {
		return err
	}
	p := Proposal{
		ID: approval.ProposalID(c.Proposal), Bytes: c.Proposal, Content: content, Progress: Open,
		Opened: t.clock, Index: t.index, Statement: t.raw,
	}
	r := t.reader()
	if _, exists := r.proposal(p.ID); exists {
		return kms.Errorf(kms.Exists, "proposal %s exists", p.ID)
	}
	if err := t.checkProposer(content); err != nil {
		return err
	}
	rule, err := r.rule(content)
	if err != nil {
		return err
	}
	if err := t.checkTimes(content, rule); err != nil {
		return err
	}
	if err := r.checkRevision(content); err != nil {
		return err
	}
	if err := t.checkSingle(content); err != nil {
		return err
	}
	if d := r.decide(p, rule, r.possible(p)); !d.Met {
		return kms.Errorf(kms.Conflict, "with the custodians that there are this can never be approved; it would take: %s", strings.Join(d.Missing, ", "))
	}
	// Refuse now what could not be carried out: try it on a copy.
	scratch := t.before.begin(t.index, t.env, nil)
	scratch.clock, scratch.replay = t.clock, t.replay
	scratch.replay = t.replay
	err = scratch.effect(content)
	scratch.Abort()
	if err != nil {
		return err
	}
	t.event(t.proposalEvent(EventProposalOpened, p))
	t.settle(p)
	return nil
}

// checkProposer holds the proposal against the cluster and the principal on whose
// behalf, or the node by which, it is opened.
func (t *tx) checkProposer(p approval.Proposal) error {
	if p.Cluster != t.before.Lineage() {
		return kms.Errorf(kms.Invalid, "the proposal is for another cluster, or for a history of this one that was given up")
	}
	who := t.env.Principal
	if who == "" {
		who = t.before.reader().nodeIdentity(t.env.Origin)
	}
	if p.Proposer != who {
		return kms.Errorf(kms.Denied, "the proposal names %s as proposer, but comes from %s", p.Proposer, who)
	}
	id, err := t.before.reader().identity(who)
	if err != nil {
		return err
	}
	return t.checkNamesake(id)
}

// checkNamesake refuses a proposer who has the name of a custodian of another site:
// approvals are held against the proposer by name.
func (t *tx) checkNamesake(id kms.Identity) error {
	if id.Role != "custodian" || t.replay || !t.before.Knows(FeatureRules) {
		return nil
	}
	r := t.before.reader()
	c, ok := r.custodian(id.Name)
	if !ok {
		return nil
	}
	if s, _, _ := r.site(c.Site); s.TrustDomain != id.TrustDomain {
		return kms.Errorf(kms.Denied, "%s is not custodian %s, who is of site %s", id, c.ID, c.Site)
	}
	return nil
}

// checkTimes holds the proposal's times against the clock and the rule. A direct
// rule has no lifetime of its own.
func (t *tx) checkTimes(p approval.Proposal, rule approval.Rule) error {
	lifetime := rule.Lifetime
	if len(rule.Direct) > 0 {
		lifetime = approval.MaxLifetime
	}
	switch {
	case p.Created > t.clock+Window || p.Created < t.clock-Window:
		return kms.Errorf(kms.Invalid, "the proposal's time of creation is more than 10 minutes from the cluster's time")
	case p.Expires > p.Created+lifetime:
		return kms.Errorf(kms.Invalid, "the proposal expires later than the policy's lifetime of %d ms allows", lifetime)
	case t.clock >= p.Expires:
		return kms.Errorf(kms.Expired, "the proposal has expired; open a new one")
	case rule.NotBefore >= p.Expires:
		return kms.Errorf(kms.Invalid, "the proposal expires before the policy's time of release; open it later, at most %d ms before that time", lifetime)
	case p.NotBefore >= p.Expires || t.clock+rule.Delay >= p.Expires:
		return kms.Errorf(kms.Invalid, "the proposal expires before its delay can be over")
	}
	return nil
}

// checkRevision refuses a proposal whose target is not as it was.
func (r reader) checkRevision(p approval.Proposal) error {
	now, err := r.revision(p.Target)
	if p.Action == kms.ActionImport && kms.KindOf(err) == kms.NotFound {
		now, err = 0, nil // the key is to be made; whether there is the keyring, the rule has said
	}
	if err != nil {
		return err
	}
	if now != p.Revision {
		return kms.Errorf(kms.Conflict, "%s is at revision %d; the proposal is about revision %d", p.Target, now, p.Revision)
	}
	return nil
}

// revision returns the revision of a target, 0 for a policy, custodian, node or site
// that is to be added.
func (r reader) revision(target string) (uint64, error) {
	kind, name, err := approval.ParseTarget(target)
	if err != nil {
		return 0, err
	}
	switch kind {
	case approval.TargetKey:
		keyring, key, err := kms.SplitKeyPath(name)
		if err != nil {
			return 0, err
		}
		k, ok := r.key(keyring, key)
		if !ok {
			return 0, kms.Errorf(kms.NotFound, "there is no key %s", name)
		}
		return k.Revision, nil
	case approval.TargetKeyring:
		k, ok := r.keyring(name)
		if !ok {
			return 0, kms.Errorf(kms.NotFound, "there is no keyring %s", name)
		}
		return k.Revision, nil
	case approval.TargetPolicy:
		p, _ := r.policy(name)
		return p.Revision, nil
	case approval.TargetCustodian:
		c, _ := r.custodian(name)
		return c.Revision, nil
	case approval.TargetNode:
		n, _ := r.node(name)
		return n.Revision, nil
	case approval.TargetSite:
		return r.siteRevision(name), nil
	case approval.TargetRecovery:
		k, _ := r.recoveryKey(name)
		return k.Number, nil
	}
	return 0, kms.Errorf(kms.Invalid, "target %q is of no known kind", target)
}

// checkSingle refuses a second proposal for the same action on the same target; of a
// node or a site for the same change, so that nobody holds up a removal with another
// proposal.
func (t *tx) checkSingle(p approval.Proposal) error {
	for _, o := range list[Proposal](t.Txn, tableProposal, byTarget, prefixKey(p.Target)) {
		if o.live() && !o.expired(t.clock) && o.Content.Action == p.Action && sameChange(o.Content, p) {
			return kms.Errorf(kms.Exists, "proposal %s to %s %s is still open; let it be decided, or reject it, before another one", o.ID, p.Action, p.Target)
		}
	}
	return nil
}

func (c CastVote) validate(e Envelope) error {
	s := c.Statement
	if err := checkProposalID(s.Proposal); err != nil {
		return err
	}
	if err := kms.CheckName("custodian", s.Custodian); err != nil {
		return err
	}
	if s.Verdict != approval.Approve && s.Verdict != approval.Reject {
		return kms.Errorf(kms.Invalid, "vote: the verdict is neither approve nor reject")
	}
	if len(s.Credential) > MaxText || len(s.Signature) == 0 || len(s.Signature) > MaxPublicKey {
		return kms.Errorf(kms.Invalid, "vote: the credential or signature is missing or too long")
	}
	return noExpect(e)
}

// verify checks the custodian's signature.
func (c CastVote) verify(t *tx) error {
	r := t.reader()
	p, ok := r.proposal(c.Statement.Proposal)
	if !ok {
		return kms.Errorf(kms.NotFound, "there is no proposal %s", c.Statement.Proposal)
	}
	cust, ok := r.custodian(c.Statement.Custodian)
	if !ok {
		return kms.Errorf(kms.Denied, "there is no custodian %s", c.Statement.Custodian)
	}
	return c.Statement.Verify(cust, p.Bytes)
}

func (c CastVote) apply(t *tx) error {
	r := t.reader()
	p, _ := r.proposal(c.Statement.Proposal)
	cust, _ := r.custodian(c.Statement.Custodian)
	switch {
	case !p.live():
		return kms.Errorf(kms.Conflict, "proposal %s is %s; it takes no more votes", p.ID, p.Progress)
	case p.expired(t.clock):
		return kms.Errorf(kms.Expired, "proposal %s has expired; open a new one", p.ID)
	}
	votes := slices.Clone(p.Votes)
	if i := slices.IndexFunc(votes, func(v Vote) bool { return v.Statement.Custodian == cust.ID }); i >= 0 {
		// A custodian may withdraw an approval; a rejection is final, for else
		// the old approval could be played again after it.
		switch old := votes[i].Statement.Verdict; {
		case !r.counts(votes[i]): // its credential is gone, and so can never be played again
		case old == c.Statement.Verdict:
			return kms.Errorf(kms.Exists, "custodian %s has given this verdict", cust.ID)
		case old == approval.Reject:
			return kms.Errorf(kms.Conflict, "custodian %s has rejected this proposal, which is final", cust.ID)
		}
		votes = slices.Delete(votes, i, i+1)
	}
	p.Votes = append(votes, Vote{Site: cust.Site, Time: t.clock, Index: t.index, Statement: c.Statement})
	e := t.proposalEvent(EventVote, p)
	e.Custodian = cust.ID
	t.event(e)
	t.settle(p)
	return nil
}

// proposalEvent returns an event about a proposal with its target's names.
func (t *tx) proposalEvent(kind string, p Proposal) Event {
	e := Event{Type: kind, Proposal: p.ID}
	switch k, name, _ := approval.ParseTarget(p.Content.Target); k {
	case approval.TargetKey:
		e.Keyring, e.Key, _ = kms.SplitKeyPath(name)
	case approval.TargetKeyring:
		e.Keyring = name
	case approval.TargetCustodian:
		e.Custodian = name
	case approval.TargetNode:
		e.Node = name
	}
	return e
}

// missingText says what a proposal still lacks.
func missingText(p Proposal, d approval.Decision) error {
	return kms.Errorf(kms.NeedsApproval, "proposal %s still needs %s", p.ID, strings.Join(d.Missing, ", "))
}
