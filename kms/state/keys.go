package state

import (
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

func (c CreateKey) validate(e Envelope) error {
	if err := kms.CheckName("keyring", c.Keyring); err != nil {
		return err
	}
	if err := kms.CheckName("key", c.Name); err != nil {
		return err
	}
	switch {
	case len(c.ID) != KeyIDSize:
		return kms.Errorf(kms.Invalid, "the key id has %d bytes, not %d", len(c.ID), KeyIDSize)
	case !slices.Contains(c.Purpose.Algorithms(), c.Algorithm):
		return kms.Errorf(kms.Invalid, "algorithm %q is not for purpose %q", c.Algorithm, c.Purpose)
	case c.RotationPeriod < 0 || c.RotationPeriod > MaxRotationPeriod:
		return kms.Errorf(kms.Invalid, "the rotation period is %d ms; it must be from 0 (on request only) to ten years", c.RotationPeriod)
	}
	if err := c.material().validate(); err != nil {
		return err
	}
	if err := checkPublicKey(c.Algorithm, c.PublicKey); err != nil {
		return err
	}
	if err := c.validateChecks(); err != nil {
		return err
	}
	return noExpect(e)
}

// validateChecks checks that there are checks for version 1 where there must be,
// and none elsewhere: those of protection software are the KEK's.
func (c CreateKey) validateChecks() error {
	switch {
	case c.material().hardware() && c.Purpose != kms.Sign:
		return validateChecks(c.Checks)
	case len(c.Checks) != 0:
		return kms.Errorf(kms.Invalid, "only a key of protection %s that does not sign is created with checks", kms.Hardware)
	}
	return nil
}

// validateErased is validate for a command without its material.
func (c CreateKey) validateErased() error {
	c.Wrapped, c.Copies = placeholder(c.Generated)
	return c.validate(Envelope{})
}

func (CreateKey) verify(*tx) error { return nil }

func (c CreateKey) apply(t *tx) error {
	k, err := t.keyringFor(c.Keyring)
	if err != nil {
		return err
	}
	r := t.reader()
	rule, err := r.keyRule(k, kms.ActionCreate)
	if err != nil {
		return err
	}
	if err := t.direct(rule); err != nil {
		return err
	}
	if err := t.checkNewKey(k, c); err != nil {
		return err
	}
	t.putKey(c, t.env.Principal, "")
	t.voidTarget(approval.KeyTarget(c.Keyring, c.Name)) // a proposal to import it
	t.event(Event{Type: EventKeyCreated, Keyring: c.Keyring, Key: c.Name, Version: 1})
	return nil
}

// checkNewKey holds a key that is to be made against its keyring and the other keys.
func (t *tx) checkNewKey(k Keyring, c CreateKey) error {
	r := t.reader()
	if _, exists := r.key(c.Keyring, c.Name); exists {
		return kms.Errorf(kms.Exists, "key %s exists", kms.KeyPath(c.Keyring, c.Name))
	}
	if _, exists := find[Key](t.Txn, tableKey, byKeyID, c.ID); exists {
		return kms.Errorf(kms.Exists, "another key has this key id; choose one at random")
	}
	if err := t.checkMaterial(k, c.Algorithm, c.material()); err != nil {
		return err
	}
	if len(c.Checks) == 0 {
		return nil
	}
	return exactly("check", r.residents(k.Residency), func(i int) string { return c.Checks[i].Node }, len(c.Checks))
}

// putKey adds a key; proposal is empty where none asked for it.
func (t *tx) putKey(c CreateKey, creator, proposal string) {
	insert(t.Txn, tableKey, Key{
		Keyring: c.Keyring, Name: c.Name, ID: c.ID, Purpose: c.Purpose, Algorithm: c.Algorithm, Primary: 1, Latest: 1,
		RotationPeriod: c.RotationPeriod, Created: t.clock, Rotated: t.clock, Creator: creator,
		Revision: 1, Index: t.index, Statement: t.raw,
	})
	insert(t.Txn, tableVersion, Version{
		Keyring: c.Keyring, Key: c.Name, Version: 1, State: kms.Active, KEK: c.KEK, Wrapped: c.Wrapped,
		Copies: c.Copies, Generated: c.Generated, PublicKey: c.PublicKey, Checks: c.Checks, Proposal: proposal,
		Created: t.clock, Activated: t.clock, Index: t.index, Statement: t.raw,
		Origin: t.env.Origin, Erased: t.claimed,
	})
}

// bump stores a changed key under its next revision and voids the other proposals
// about it.
func (t *tx) bump(k Key) {
	k.Revision++
	insert(t.Txn, tableKey, k)
	t.voidTarget(keyTarget(k))
}

// destroyedWhole reports whether no version of the key has material any more.
func (r reader) destroyedWhole(k Key) bool {
	return !slices.ContainsFunc(r.versions(k.Keyring, k.Name), func(v Version) bool { return !v.State.Gone() })
}
