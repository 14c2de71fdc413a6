package state

import (
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

// CommitKEK brings the new version of a keyring's KEK that an authorised proposal
// asked for. The first one wins. It becomes the primary version when the receipts
// that the keyring asks for are in; then the key versions are rewrapped (Rewrap).
type CommitKEK struct {
	Proposal string       `cbor:"proposal"`
	Keyring  string       `cbor:"keyring"`
	Version  uint32       `cbor:"version"`
	Copies   []SealedCopy `cbor:"copies"` // one for every resident node, sorted
	Checks   []Check      `cbor:"checks"` // the same nodes
}

// Type implements Command.
func (CommitKEK) Type() Type { return TypeCommitKEK }

func (c CommitKEK) validate(e Envelope) error {
	if err := kms.CheckName("keyring", c.Keyring); err != nil {
		return err
	}
	if err := checkProposalID(c.Proposal); err != nil {
		return err
	}
	if c.Version < 2 {
		return kms.Errorf(kms.Invalid, "rotation of a KEK: it needs a version of at least 2")
	}
	if err := validateCopies(c.Copies); err != nil {
		return err
	}
	if err := validateChecks(c.Checks); err != nil {
		return err
	}
	if e.Principal != "" {
		return kms.Errorf(kms.Invalid, "rotation of a KEK: a node commits it on nobody's behalf")
	}
	return nil
}

func (CommitKEK) verify(*tx) error { return nil }

func (c CommitKEK) apply(t *tx) error {
	k, err := t.keyringFor(c.Keyring)
	if err != nil {
		return err
	}
	p, err := t.executable(c.Proposal)
	if err != nil {
		return err
	}
	if p.Content.Action != kms.ActionRotate || p.Content.Target != approval.KeyringTarget(c.Keyring) {
		return kms.Errorf(kms.Conflict, "proposal %s is not to rotate the KEK of keyring %s", p.ID, c.Keyring)
	}
	if _, err := t.rotatableKEK(c.Keyring); err != nil {
		return err
	}
	if newest := t.reader().newestKEK(c.Keyring).Version; c.Version != newest+1 {
		return kms.Errorf(kms.Conflict, "the next KEK version of keyring %s is %d, not %d", c.Keyring, newest+1, c.Version)
	}
	nodes := t.reader().residents(k.Residency)
	if err := checkCopies(nodes, c.Copies); err != nil {
		return err
	}
	if err := exactly("check", nodes, func(i int) string { return c.Checks[i].Node }, len(c.Checks)); err != nil {
		return err
	}
	t.execute(p)
	insert(t.Txn, tableKEK, KEK{
		Keyring: c.Keyring, Version: c.Version, Copies: c.Copies, Checks: c.Checks, Created: t.clock, Proposal: c.Proposal, Index: t.index,
	})
	k.Revision++
	insert(t.Txn, tableKeyring, k)
	t.voidTarget(approval.KeyringTarget(k.Name))
	t.event(Event{Type: EventKEKCommitted, Keyring: c.Keyring, Version: c.Version, Proposal: c.Proposal, Node: t.env.Origin})
	return nil
}

// knowsKEKRotation refuses the target of a rotation of a KEK while some node's program
// does not know it, with the kind that such a program gives.
func (t *tx) knowsKEKRotation(target string) error {
	if t.replay || !isKeyringTarget(target) {
		return nil
	}
	if lacking := t.before.Lacking(CommandKind{TypeCommitKEK, 1}); len(lacking) > 0 {
		return kms.Errorf(kms.Invalid, "the release that node %s runs has not announced that it knows rotations of KEKs; start the node, with a newer release if need be", lacking[0])
	}
	return nil
}

// rotatableKEK returns a keyring whose KEK may be rotated. One rotation may overtake
// another that does not come to its end.
func (t *tx) rotatableKEK(keyring string) (Keyring, error) {
	k, ok := t.reader().keyring(keyring)
	switch {
	case !ok:
		return k, kms.Errorf(kms.NotFound, "there is no keyring %s", keyring)
	case k.Protection == kms.Hardware:
		return k, kms.Errorf(kms.Conflict, "keyring %s has protection %s and therefore no KEK: each node's device holds the key versions themselves; rotate its keys", keyring, kms.Hardware)
	}
	r := t.reader()
	p, _ := r.policy(k.Policy)
	return k, allowCopies(p, r.residents(k.Residency))
}

// activateKEK makes a KEK version the primary one when its receipts suffice and no
// later one is.
func (t *tx) activateKEK(k Keyring, kek KEK) {
	if kek.Version <= k.KEK || !t.reader().provenKEK(k, kek) {
		return
	}
	kek.Activated = t.clock
	insert(t.Txn, tableKEK, kek)
	k.KEK = kek.Version
	insert(t.Txn, tableKeyring, k)
	t.event(Event{Type: EventKEKActivated, Keyring: k.Name, Version: kek.Version, Proposal: kek.Proposal})
}

// RetireKEK ends a KEK version that wraps nothing any more: its copies are dropped,
// and the statements of the rewraps to it. A resident node sends it.
type RetireKEK struct {
	Keyring string `cbor:"keyring"`
	Version uint32 `cbor:"version"`
}

// Type implements Command.
func (RetireKEK) Type() Type { return TypeRetireKEK }

func (c RetireKEK) validate(e Envelope) error {
	if err := kms.CheckName("keyring", c.Keyring); err != nil {
		return err
	}
	switch {
	case c.Version == 0:
		return kms.Errorf(kms.Invalid, "retirement of a KEK: it needs a version")
	case e.Principal != "":
		return kms.Errorf(kms.Invalid, "retirement of a KEK: a node does it on nobody's behalf")
	}
	return noExpect(e)
}

func (RetireKEK) verify(*tx) error { return nil }

// apply retires the version. When a stored statement is replayed, what is wrapped
// under the version cannot be told: the rewraps that moved it elsewhere may be gone
// with a later retirement. It was judged before the statement was stored.
func (c RetireKEK) apply(t *tx) error {
	k, err := t.keyringFor(c.Keyring)
	if err != nil {
		return err
	}
	r := t.reader()
	kek, ok := r.kek(c.Keyring, c.Version)
	switch {
	case !ok:
		return kms.Errorf(kms.NotFound, "keyring %s has no KEK version %d", c.Keyring, c.Version)
	case kek.Retired():
		return kms.Errorf(kms.Exists, "KEK version %d of keyring %s is retired", c.Version, c.Keyring)
	case c.Version >= k.KEK:
		return kms.Errorf(kms.Conflict, "KEK version %d of keyring %s is not an old one; the primary one is %d", c.Version, c.Keyring, k.KEK)
	case !t.replay && r.wraps(c.Keyring, c.Version):
		return kms.Errorf(kms.Conflict, "KEK version %d of keyring %s still wraps key versions", c.Version, c.Keyring)
	}
	kek.Copies = nil
	kek.RetiredAt, kek.RetiredIndex, kek.Retirement = t.clock, t.index, t.raw
	insert(t.Txn, tableKEK, kek)
	for _, s := range list[resealed](t.Txn, tableResealed, byID, resealedKey(c.Keyring, "", c.Version)) {
		mustDB(t.Delete(tableResealed, &s))
	}
	for _, b := range r.batches(c.Keyring, c.Version) {
		mustDB(t.Delete(tableRewrap, &b))
	}
	for _, x := range r.refusedRewraps(c.Keyring, c.Version) {
		mustDB(t.Delete(tableRewrapRefused, &x))
	}
	t.dropRecoveryCopies(c.Keyring, c.Version, func(RecoveryCopy) bool { return true })
	t.event(Event{Type: EventKEKRetired, Keyring: c.Keyring, Version: c.Version, Node: t.env.Origin})
	return nil
}

// residencyChanged does what only waited for a node that has gone: a KEK version
// becomes primary, a batch of rewrapped key versions comes into use.
func (t *tx) residencyChanged() {
	for _, k := range t.reader().keyrings() {
		if k.Protection == kms.Hardware {
			continue
		}
		for _, kek := range t.reader().keks(k.Name) {
			k, _ = t.reader().keyring(k.Name)
			t.activateKEK(k, kek)
		}
		k, _ = t.reader().keyring(k.Name)
		for _, b := range t.reader().openBatches(k.Name) {
			if b.KEK == k.KEK {
				t.complete(k, b)
			}
		}
	}
}
