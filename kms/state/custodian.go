package state

import (
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

// changeCustodian adds, replaces, restores or revokes a custodian and settles every live
// proposal anew.
func (t *tx) changeCustodian(p approval.Proposal) error {
	params, err := p.CustodianParams()
	if err != nil {
		return err
	}
	r := t.reader()
	old, exists := r.custodian(params.Custodian.ID)
	next, err := params.Change(old, exists)
	switch {
	case err != nil:
		return err
	case !exists && len(r.custodians()) >= MaxCustodians:
		return kms.Errorf(kms.TooLarge, "there are %d custodians, which is the limit", MaxCustodians)
	case !slices.ContainsFunc(r.sites(), func(s Site) bool { return s.ID == next.Site }):
		return kms.Errorf(kms.NotFound, "there is no site %s", next.Site)
	}
	if err := r.governance().AllowCustodian(old, next); err != nil {
		return err
	}
	insert(t.Txn, tableCustodian, next)
	all := r.custodians()
	if err := approval.CheckCustodians(all); err != nil {
		return err
	}
	if err := approval.CheckCustodianChange(r.policies(), all); err != nil {
		return err
	}
	t.voidTarget(p.Target)
	for _, o := range r.live() {
		t.settle(o)
	}
	t.event(Event{Type: EventCustodianChanged, Custodian: next.ID})
	return nil
}
