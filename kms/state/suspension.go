package state

import (
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

// TypeSuspendCredential is the type of SuspendCredential.
const TypeSuspendCredential Type = 31

// SuspendCredential suspends a credential of a custodian at once, by the statement of a
// colleague of the same site. A quorum restores it (approval.CustodianParams.Restore).
type SuspendCredential struct {
	Statement approval.Suspension `cbor:"statement"`
}

// Type implements Command.
func (SuspendCredential) Type() Type { return TypeSuspendCredential }

// Suspension is a credential's suspension as recorded. It stays when the credential is
// restored: the votes in between were counted without it.
type Suspension struct {
	Custodian  string `cbor:"custodian"`
	Credential string `cbor:"credential"`
	By         string `cbor:"by"` // custodian
	Reason     string `cbor:"reason"`
	Time       int64  `cbor:"time"`  // cluster clock
	Index      uint64 `cbor:"index"` // of Statement in the log
	Statement  []byte `cbor:"statement"`
}

// suspensionID: each suspension is of another revision of its custodian's record, and
// the log has them in order.
func suspensionID(r *Suspension) []byte { return numberKey(r.Index) }

func (c SuspendCredential) validate(e Envelope) error {
	if err := c.Statement.Validate(); err != nil {
		return err
	}
	return noExpect(e)
}

// verify checks the colleague's signature against the records in force.
func (c SuspendCredential) verify(t *tx) error {
	s := c.Statement
	if s.Cluster != t.before.Lineage() {
		return kms.Errorf(kms.Invalid, "the suspension is for another cluster, or for a history of this one that was given up")
	}
	r := t.reader()
	of, ok := r.custodian(s.Custodian)
	if !ok {
		return kms.Errorf(kms.NotFound, "there is no custodian %s", s.Custodian)
	}
	by, ok := r.custodian(s.By)
	if !ok {
		return kms.Errorf(kms.Denied, "there is no custodian %s", s.By)
	}
	return s.Verify(of, by)
}

// apply suspends unless then nobody could restore the credential but with the one who
// suspends, who may be a thief, and settles every live proposal anew.
func (c SuspendCredential) apply(t *tx) error {
	s := c.Statement
	r := t.reader()
	next, _ := r.custodian(s.Custodian)
	next = next.Suspend(s.Credential)
	next.Revision++
	insert(t.Txn, tableCustodian, next)
	if err := approval.Restorable(r.policies(), r.custodians(), s.By); err != nil {
		return err
	}
	insert(t.Txn, tableSuspension, Suspension{
		Custodian: s.Custodian, Credential: s.Credential, By: s.By, Reason: s.Reason, Time: t.clock, Index: t.index, Statement: t.raw,
	})
	t.voidTarget(approval.CustodianTarget(s.Custodian))
	for _, p := range r.live() {
		t.settle(p)
	}
	t.event(Event{Type: EventCredentialSuspended, Custodian: s.Custodian})
	return nil
}

// Suspensions returns the suspensions of credentials, restored ones too, in the order of
// the log.
func (s *State) Suspensions() []Suspension {
	return list[Suspension](s.read(), tableSuspension, byID, []byte{})
}

// knowsCredentials refuses, while some node's program does not know them, what proposals
// on custodians have had since credentials can be suspended, with the kind that such a
// program gives. When all know it, new credentials need the proof of possession.
func (t *tx) knowsCredentials(p approval.Proposal) error {
	if p.Action != kms.ActionCustodian {
		return nil
	}
	params, err := p.CustodianParams()
	if err != nil {
		return err
	}
	lacking := t.before.Lacking(CommandKind{TypeSuspendCredential, 1})
	if len(lacking) > 0 && !t.replay && len(params.Possession)+len(params.Restore) > 0 {
		return kms.Errorf(kms.Invalid, "the release that node %s runs has not announced that it knows proofs of possession; start the node, with a newer release if need be", lacking[0])
	}
	old, _ := t.reader().custodian(params.Custodian.ID)
	return params.VerifyPossession(t.before.Cluster(), old, len(lacking) == 0 && !t.replay)
}
