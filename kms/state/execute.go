package state

import (
	"crypto/sha256"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

func (c Execute) validate(e Envelope) error {
	if e.Principal != "" {
		return kms.Errorf(kms.Invalid, "execute: a node does it on nobody's behalf")
	}
	return checkProposalID(c.Proposal)
}

// verify checks the proof of possession of a node's new root once more.
func (c Execute) verify(t *tx) error {
	p, ok := t.reader().proposal(c.Proposal)
	if !ok || !p.live() {
		return nil // for apply to say
	}
	if err := t.verifyRecovery(p.Content); err != nil {
		return err
	}
	return t.verifyRoot(p.Content)
}

func (c Execute) apply(t *tx) error {
	p, err := t.executable(c.Proposal)
	if err != nil {
		return err
	}
	switch p.Content.Action {
	case kms.ActionRotate:
		return kms.Errorf(kms.Invalid, "proposal %s is to rotate; a resident node commits the new version", p.ID)
	case kms.ActionImport:
		return kms.Errorf(kms.Invalid, "proposal %s is to import; the node that has the material brings the key", p.ID)
	}
	t.execute(p)
	return t.effect(p.Content)
}

// executable returns a proposal that may be carried out now by the command at hand.
func (t *tx) executable(id string) (Proposal, error) {
	r := t.reader()
	p, ok := r.proposal(id)
	if !ok {
		return p, kms.Errorf(kms.NotFound, "there is no proposal %s", id)
	}
	switch {
	case !p.live():
		return p, kms.Errorf(kms.Conflict, "proposal %s is %s", id, p.Progress)
	case p.expired(t.clock):
		return p, kms.Errorf(kms.Expired, "proposal %s has expired; open a new one", id)
	case t.env.Expect != p.Content.Revision:
		return p, kms.Errorf(kms.Conflict, "the command expects revision %d of %s; proposal %s is about revision %d", t.env.Expect, p.Content.Target, id, p.Content.Revision)
	}
	rule, err := r.rule(p.Content)
	if err != nil {
		return p, err
	}
	if err := r.checkRevision(p.Content); err != nil {
		return p, err
	}
	if d := r.decide(p, rule, approvers(r, p)); !d.Met || p.Progress != Authorised {
		return p, missingText(p, d)
	}
	if t.clock < p.executable(rule) {
		return p, kms.Errorf(kms.Conflict, "proposal %s may be carried out %d ms from now", id, p.executable(rule)-t.clock)
	}
	return p, nil
}

// execute closes a proposal with the command at hand.
func (t *tx) execute(p Proposal) {
	p.Progress, p.ClosedAt, p.Executed, p.Execution = Executed, t.clock, t.index, t.raw
	insert(t.Txn, tableProposal, p)
	t.event(t.proposalEvent(EventProposalExecuted, p))
}

// effect does what a proposal says, or returns why that cannot be done. For a
// rotation and an import it checks only: the material comes with CommitRotation, ImportKey.
func (t *tx) effect(p approval.Proposal) error {
	_, name, err := approval.ParseTarget(p.Target)
	if err != nil {
		return err
	}
	switch p.Action {
	case kms.ActionPolicy:
		return t.changePolicy(name, p)
	case kms.ActionCustodian:
		return t.changeCustodian(p)
	case kms.ActionNode:
		return t.changeNode(name, p)
	case kms.ActionSite:
		return t.changeSite(name, p)
	case kms.ActionRecoveryKey:
		return t.setRecoveryKey(name, p)
	}
	if isKeyringTarget(p.Target) {
		_, err := t.rotatableKEK(name)
		return err
	}
	keyring, key, err := kms.SplitKeyPath(name)
	if err != nil {
		return err
	}
	switch p.Action {
	case kms.ActionRotate:
		_, err := t.rotatable(keyring, key)
		return err
	case kms.ActionImport:
		return t.importable(keyring, key, p)
	case kms.ActionSuspend, kms.ActionResume:
		return t.suspend(keyring, key, p.Action == kms.ActionSuspend)
	case kms.ActionSchedule:
		return t.reschedule(keyring, key, p)
	}
	v, err := p.VersionParams()
	if err != nil {
		return err
	}
	if p.Action == kms.ActionDeactivate || p.Action == kms.ActionDestroy {
		if err := t.checkUnused(p, keyring, key, v.Version); err != nil {
			return err
		}
	}
	return t.changeVersions(keyring, key, v.Version, p.Action)
}

// suspend sets or clears a key's suspension.
func (t *tx) suspend(keyring, name string, on bool) error {
	r := t.reader()
	k, ok := r.key(keyring, name)
	path := kms.KeyPath(keyring, name)
	switch {
	case !ok:
		return kms.Errorf(kms.NotFound, "there is no key %s", path)
	case on && k.Suspended:
		return kms.Errorf(kms.Conflict, "key %s is suspended already", path)
	case !on && !k.Suspended:
		return kms.Errorf(kms.Conflict, "key %s is not suspended", path)
	case r.destroyedWhole(k):
		return kms.Errorf(kms.Conflict, "key %s is destroyed", path)
	}
	k.Suspended = on
	t.bump(k)
	kind := EventKeyResumed
	if on {
		kind = EventKeySuspended
	}
	t.event(Event{Type: kind, Keyring: keyring, Key: name})
	return nil
}

// changeVersions activates, deactivates, compromises or destroys one version, or destroys all
// where n is 0.
func (t *tx) changeVersions(keyring, name string, n uint32, action kms.Action) error {
	r := t.reader()
	path := kms.KeyPath(keyring, name)
	k, ok := r.key(keyring, name)
	if !ok {
		return kms.Errorf(kms.NotFound, "there is no key %s", path)
	}
	if action == kms.ActionDestroy && n == 0 {
		return t.destroyKey(k)
	}
	v, ok := r.version(keyring, name, n)
	switch {
	case !ok:
		return kms.Errorf(kms.NotFound, "there is no version %d of key %s", n, path)
	case n == k.Primary && action != kms.ActionCompromise:
		return kms.Errorf(kms.Conflict, "version %d of key %s is the primary one; rotate first", n, path)
	}
	if action == kms.ActionActivate {
		return t.activateNow(k, v)
	}
	next := follows(v.State, action)
	if !v.State.CanBecome(next) {
		return kms.Errorf(kms.Conflict, "version %d of key %s is %s; it cannot become %s", n, path, v.State, next)
	}
	t.become(&k, v, next)
	if n == k.Primary {
		k.Primary = 0 // no new use of a compromised version; the next rotation sets another
	}
	t.bump(k)
	return nil
}

// follows returns the state that an action leads to.
func follows(s kms.State, action kms.Action) kms.State {
	switch action {
	case kms.ActionDeactivate:
		return kms.Deactivated
	case kms.ActionCompromise:
		if s == kms.Destroyed {
			return kms.DestroyedCompromised
		}
		return kms.Compromised
	case kms.ActionDestroy:
		if s == kms.Compromised {
			return kms.DestroyedCompromised
		}
		if s.Gone() {
			return "" // allowed for nothing
		}
		return kms.Destroyed
	}
	return ""
}

// destroyKey destroys every version that is left.
func (t *tx) destroyKey(k Key) error {
	r := t.reader()
	if r.destroyedWhole(k) {
		return kms.Errorf(kms.Conflict, "key %s is destroyed", kms.KeyPath(k.Keyring, k.Name))
	}
	for _, v := range r.versions(k.Keyring, k.Name) {
		if v.State.Gone() {
			continue
		}
		next := follows(v.State, kms.ActionDestroy)
		if !v.State.CanBecome(next) {
			return kms.Errorf(kms.Conflict, "version %d is %s; it cannot become %s", v.Version, v.State, next)
		}
		t.become(&k, v, next)
	}
	k.Primary = 0
	t.bump(k)
	t.event(Event{Type: EventKeyDestroyed, Keyring: k.Keyring, Key: k.Name})
	return nil
}

// become stores a version in its next state. A destroyed one loses its material,
// also where a signed command still carries it; k is the caller's to store.
func (t *tx) become(k *Key, v Version, next kms.State) {
	kind := map[kms.State]string{kms.Deactivated: EventVersionDeactivated, kms.Compromised: EventVersionCompromised}[next]
	if next.Gone() {
		kind = EventVersionDestroyed
		if !v.State.Gone() {
			t.erase(k, &v)
		}
	}
	v.State = next
	insert(t.Txn, tableVersion, v)
	t.event(Event{Type: kind, Keyring: v.Keyring, Key: v.Key, Version: v.Version})
}

func (t *tx) erase(k *Key, v *Version) {
	if len(v.Statement) > 0 {
		sum := sha256.Sum256(v.Statement)
		v.Erased = sum[:]
	}
	v.Wrapped, v.Copies, v.Statement, v.Next = nil, nil, nil, nil
	if v.Made != 0 { // as its command said
		v.KEK, v.Made = v.Made, 0
	}
	for _, s := range list[resealed](t.Txn, tableResealed, byID, resealedKey(v.Keyring, v.Key, v.Version)) {
		mustDB(t.Delete(tableResealed, &s))
	}
	t.dropUses(*v)
	if v.Version == 1 {
		k.Statement = nil
	}
	if p, ok := t.reader().proposal(v.Proposal); ok {
		p.Execution = nil
		insert(t.Txn, tableProposal, p)
	}
}

// changePolicy replaces or adds a policy, voids what was proposed under it and
// settles the proposals on custodians anew: every policy bears on them.
func (t *tx) changePolicy(name string, p approval.Proposal) error {
	params, err := p.PolicyParams()
	if err != nil {
		return err
	}
	r := t.reader()
	old, exists := r.policy(name)
	if !exists && len(r.policies()) >= MaxPolicies {
		return kms.Errorf(kms.TooLarge, "there are %d policies, which is the limit", MaxPolicies)
	}
	next := approval.Policy{Name: name, Revision: old.Revision + 1, Rules: params.Rules, Attested: params.Attested, Forbid: params.Forbid}
	if err := checkPolicy(next, r.custodians(), r.sites()); err != nil {
		return err
	}
	if err := t.checkAttested(next); err != nil {
		return err
	}
	if err := t.keepsRecoverable(next); err != nil {
		return err
	}
	insert(t.Txn, tablePolicy, next)
	t.voidTarget(p.Target)
	for _, o := range r.live() {
		switch {
		case o.Content.Policy == name:
			t.void(o)
		case o.Content.Action == kms.ActionCustodian:
			t.settle(o)
		}
	}
	t.event(Event{Type: EventPolicyChanged})
	return nil
}

// keepsRecoverable refuses a governance policy by which nobody could recover the cluster, once
// all nodes run a release that does; programs of before would set it.
func (t *tx) keepsRecoverable(p approval.Policy) error {
	r := t.reader()
	if p.Name != kms.Governance || t.replay || len(r.sites()) == 1 || t.before.knownToAll("recovery", "") != nil {
		return nil
	}
	return checkRecoverable(p, r.custodians())
}
