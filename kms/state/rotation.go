package state

import (
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

func (c CommitRotation) validate(e Envelope) error {
	if err := kms.CheckName("keyring", c.Keyring); err != nil {
		return err
	}
	if err := kms.CheckName("key", c.Key); err != nil {
		return err
	}
	if err := checkProposalID(c.Proposal); err != nil {
		return err
	}
	if c.Version < 2 {
		return kms.Errorf(kms.Invalid, "rotation: it needs a version of at least 2")
	}
	if len(c.PublicKey) > MaxPublicKey {
		return kms.Errorf(kms.Invalid, "rotation: the public key is longer than %d bytes", MaxPublicKey)
	}
	if err := c.material().validate(); err != nil {
		return err
	}
	if len(c.Checks) > 0 || !c.material().hardware() {
		if err := validateChecks(c.Checks); err != nil {
			return err
		}
	}
	if e.Principal != "" {
		return kms.Errorf(kms.Invalid, "rotation: a node commits it on nobody's behalf")
	}
	return nil
}

// validateErased is validate for a command without its material.
func (c CommitRotation) validateErased() error {
	c.Wrapped, c.Copies = placeholder(c.Generated)
	return c.validate(Envelope{})
}

func (CommitRotation) verify(*tx) error { return nil }

func (c CommitRotation) apply(t *tx) error {
	k, err := t.keyringFor(c.Keyring)
	if err != nil {
		return err
	}
	p, err := t.executable(c.Proposal)
	if err != nil {
		return err
	}
	if p.Content.Action != kms.ActionRotate || p.Content.Target != approval.KeyTarget(c.Keyring, c.Key) {
		return kms.Errorf(kms.Conflict, "proposal %s is not to rotate %s", p.ID, kms.KeyPath(c.Keyring, c.Key))
	}
	key, err := t.rotatable(c.Keyring, c.Key)
	if err != nil {
		return err
	}
	if c.Version != key.Latest+1 {
		return kms.Errorf(kms.Conflict, "the next version of %s is %d, not %d", kms.KeyPath(c.Keyring, c.Key), key.Latest+1, c.Version)
	}
	if err := t.checkMaterial(k, key.Algorithm, c.material()); err != nil {
		return err
	}
	if err := checkPublicKey(key.Algorithm, c.PublicKey); err != nil {
		return err
	}
	if err := c.checkChecks(t.reader().residents(k.Residency), key); err != nil {
		return err
	}
	t.execute(p)
	t.putVersion(c, key)
	return nil
}

// checkChecks checks that there is a check for every resident node; none for a
// sign key of protection hardware, whose receipts are signatures.
func (c CommitRotation) checkChecks(nodes []Node, key Key) error {
	if c.material().hardware() && key.Purpose == kms.Sign {
		if len(c.Checks) != 0 {
			return kms.Errorf(kms.Invalid, "a sign key of protection %s has no checks; its receipts are signatures by the new version", kms.Hardware)
		}
		return nil
	}
	return exactly("check", nodes, func(i int) string { return c.Checks[i].Node }, len(c.Checks))
}

// putVersion adds the new, pre-active version.
func (t *tx) putVersion(c CommitRotation, key Key) {
	insert(t.Txn, tableVersion, Version{
		Keyring: c.Keyring, Key: c.Key, Version: c.Version, State: kms.PreActive, KEK: c.KEK, Wrapped: c.Wrapped,
		Copies: c.Copies, Generated: c.Generated, PublicKey: c.PublicKey, Checks: c.Checks, Proposal: c.Proposal, Created: t.clock, Index: t.index, Statement: t.raw,
		Origin: t.env.Origin, Erased: t.claimed,
	})
	key.Latest = c.Version
	t.bump(key)
	t.event(Event{Type: EventVersionCommitted, Keyring: c.Keyring, Key: c.Key, Version: c.Version, Proposal: c.Proposal, Node: t.env.Origin})
}

// rotatable returns a key that may get a new version.
func (t *tx) rotatable(keyring, name string) (Key, error) {
	r := t.reader()
	key, ok := r.key(keyring, name)
	path := kms.KeyPath(keyring, name)
	switch {
	case !ok:
		return key, kms.Errorf(kms.NotFound, "there is no key %s", path)
	case key.Suspended:
		return key, kms.Errorf(kms.Conflict, "key %s is suspended; resume it first", path)
	case r.destroyedWhole(key):
		return key, kms.Errorf(kms.Conflict, "key %s is destroyed", path)
	}
	k, _ := r.keyring(keyring)
	return key, r.allowMaterial(k, key.Algorithm)
}

// applyVersion records a receipt for a key version and makes the version primary
// when the receipts suffice.
func (c GiveReceipt) applyVersion(t *tx, k Keyring) error {
	r := t.reader()
	v, ok := r.version(c.Keyring, c.Key, c.Version)
	if !ok {
		return kms.Errorf(kms.NotFound, "there is no version %d of key %s", c.Version, kms.KeyPath(c.Keyring, c.Key))
	}
	if v.State.Gone() {
		return kms.Errorf(kms.Conflict, "version %d of key %s is destroyed", c.Version, kms.KeyPath(c.Keyring, c.Key))
	}
	var err error
	if v.signsReceipts() {
		err = t.checkAsked(v) // its signature is verified
	} else {
		err = t.checkValue(c, v.Checks)
	}
	if err != nil {
		return err
	}
	if v.Receipts, err = t.receive(c, v.Receipts); err != nil {
		return err
	}
	insert(t.Txn, tableVersion, v)
	t.event(Event{Type: EventReceipt, Keyring: c.Keyring, Key: c.Key, Version: c.Version, Node: t.env.Origin})
	t.activate(k, v)
	return nil
}

// activate makes a pre-active version primary if its receipts suffice.
func (t *tx) activate(k Keyring, v Version) {
	r := t.reader()
	asked := func(n Node) bool { return r.joined(n.ID) < v.Index }
	if v.State != kms.PreActive || r.overtaken(v) || !r.proven(k, v.Receipts, asked) {
		return
	}
	key, _ := r.key(v.Keyring, v.Key)
	t.makePrimary(key, v)
}

// activateNow makes a pre-active version primary although receipts for it are missing:
// a quorum has decided that the nodes without it are not to be waited for. They give
// theirs when they can open it. One node that is still there must have given its own.
func (t *tx) activateNow(key Key, v Version) error {
	r, path := t.reader(), kms.KeyPath(v.Keyring, v.Key)
	ring, _ := r.keyring(v.Keyring)
	shown := slices.ContainsFunc(r.residents(ring.Residency), func(n Node) bool {
		return slices.ContainsFunc(v.Receipts, func(x Receipt) bool { return x.Node == n.ID })
	})
	switch {
	case key.Suspended:
		return kms.Errorf(kms.Conflict, "key %s is suspended; resume it first", path)
	case v.State != kms.PreActive:
		return kms.Errorf(kms.Conflict, "version %d of key %s is %s; only a pre-active one can be activated", v.Version, path, v.State)
	case r.overtaken(v):
		return kms.Errorf(kms.Conflict, "a later version of key %s has been active, so version %d stays as it is", path, v.Version)
	case !shown:
		return kms.Errorf(kms.Conflict, "no node has shown yet that it can open version %d of key %s", v.Version, path)
	}
	t.makePrimary(key, v)
	return nil
}

func (t *tx) makePrimary(key Key, v Version) {
	v.State, v.Activated = kms.Active, t.clock
	insert(t.Txn, tableVersion, v)
	key.Primary, key.Rotated = v.Version, t.clock
	t.bump(key)
	t.event(Event{Type: EventVersionActivated, Keyring: v.Keyring, Key: v.Key, Version: v.Version, Proposal: v.Proposal})
}

// checkAsked refuses a receipt of a node that has no copy of the version.
func (t *tx) checkAsked(v Version) error {
	if !t.replay && !slices.ContainsFunc(v.Copies, func(c SealedCopy) bool { return c.Node == t.env.Origin }) {
		return kms.Errorf(kms.NotFound, "no receipt is asked of node %s for this version", t.env.Origin)
	}
	return nil
}

// overtaken reports whether a later version has been active: v then stays
// pre-active for good, also when the later one is compromised and the key has no
// primary version. Else a node could keep its receipt back until then.
func (r reader) overtaken(v Version) bool {
	return slices.ContainsFunc(r.versions(v.Keyring, v.Key), func(x Version) bool { return x.Version > v.Version && x.Activated > 0 })
}
