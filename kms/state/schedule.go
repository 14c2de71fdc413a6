package state

import (
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

// reschedule gives a key another rotation period, which counts from its last rotation.
// The same one again is taken: when a destroyed version 1 is replayed from a snapshot, its
// key begins with the period that it has at last (see origin).
func (t *tx) reschedule(keyring, name string, p approval.Proposal) error {
	params, err := p.ScheduleParams()
	if err != nil {
		return err
	}
	r := t.reader()
	k, ok := r.key(keyring, name)
	switch path := kms.KeyPath(keyring, name); {
	case !ok:
		return kms.Errorf(kms.NotFound, "there is no key %s", path)
	case r.destroyedWhole(k):
		return kms.Errorf(kms.Conflict, "key %s is destroyed", path)
	}
	k.RotationPeriod = params.RotationPeriod
	t.bump(k)
	t.event(Event{Type: EventKeyRescheduled, Keyring: keyring, Key: name})
	return nil
}
