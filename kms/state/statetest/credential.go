package statetest

import (
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
)

// Possess returns the parameters with the proofs of possession that they lack, for the
// keys that the World holds.
func (w *World) Possess(p approval.CustodianParams) approval.CustodianParams {
	w.t.Helper()
	s := w.State()
	old, _ := s.Custodian(p.Custodian.ID)
	if len(s.Lacking(state.CommandKind{Type: state.TypeSuspendCredential, Version: 1})) > 0 || p.Custodian.Revoked || len(p.Possession)+len(p.Restore) > 0 {
		return p
	}
	w.mu.Lock()
	key := w.custodians[p.Custodian.ID]
	w.mu.Unlock()
	for _, k := range p.Custodian.Credentials {
		if key == nil || old.Active(k.ID) || string(key.PublicKey()) != string(k.PublicKey) {
			continue
		}
		sig, err := key.Sign(approval.CredentialCard(s.Cluster(), p.Custodian.ID, k), []byte(approval.CredentialContext))
		if err != nil {
			w.t.Fatal(err)
		}
		p.Possession = append(p.Possession, approval.Possession{Credential: k.ID, Signature: sig})
	}
	return p
}

// Suspension returns the statement by which a custodian, with the key that the World
// holds for them, suspends the first credential of another that is not suspended.
func (w *World) Suspension(custodian, by string) approval.Suspension {
	w.t.Helper()
	s := w.State()
	of, _ := s.Custodian(custodian)
	with, _ := s.Custodian(by)
	x := approval.Suspension{Cluster: s.Lineage(), Custodian: custodian, Revision: of.Revision, By: by, Reason: "lost"}
	for _, k := range of.Credentials {
		if !k.Suspended {
			x.Credential = k.ID
			break
		}
	}
	for _, k := range with.Credentials {
		if string(k.PublicKey) == string(w.Custodian(by).PublicKey()) {
			x.With = k.ID
		}
	}
	return w.SignSuspension(x)
}

// SignSuspension signs a suspension with the key of the custodian who is named as By.
func (w *World) SignSuspension(x approval.Suspension) approval.Suspension {
	w.t.Helper()
	sig, err := w.Custodian(x.By).Sign(x.Message(), []byte(approval.SuspensionContext))
	if err != nil {
		w.t.Fatal(err)
	}
	x.Signature = sig
	return x
}

// SuspendCredential has one custodian suspend a credential of another.
func (w *World) SuspendCredential(custodian, by string) {
	w.t.Helper()
	w.Do(w.FirstNode(), state.SuspendCredential{Statement: w.Suspension(custodian, by)})
}

// RestoreParams are the parameters by which all suspended credentials of a custodian
// are restored.
func (w *World) RestoreParams(custodian string) approval.CustodianParams {
	c, _ := w.State().Custodian(custodian)
	p := approval.CustodianParams{Custodian: c.Restored()}
	p.Custodian.Revision = 0
	for _, k := range c.Credentials {
		if k.Suspended {
			p.Restore = append(p.Restore, k.ID)
		}
	}
	return p
}
