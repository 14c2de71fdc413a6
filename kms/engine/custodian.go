package engine

import (
	"context"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// SuspendCredential records a custodian's signed statement that a credential of a
// colleague is suspended. Whoever may submit votes may submit it: the signature alone
// says whose it is. Errors: kms.Invalid, kms.NotFound, kms.Denied (another site, or a
// credential that does not count), kms.BadSignature, kms.Conflict (the custodian has changed; nobody could restore it), and those of every
// write.
func (e *Engine) SuspendCredential(ctx context.Context, c Caller, id string, q wire.SuspendRequest) (wire.Custodian, error) {
	rq := &request{caller: c, act: ActVote, about: aboutName("custodian", id)}
	return do(ctx, e, rq, func(st *state.State) (wire.Custodian, error) {
		s := approval.Suspension(q.Statement)
		if s.Custodian != id {
			return wire.Custodian{}, kms.Errorf(kms.Invalid, "the statement is about another custodian than the one addressed")
		}
		if of, ok := st.Custodian(id); ok && of.Restored().Active(s.Credential) && !of.Active(s.Credential) {
			return custodianView(of), nil // a repetition, or somebody was faster
		}
		if lacking := st.Lacking(state.CommandKind{Type: state.TypeSuspendCredential, Version: 1}); len(lacking) > 0 {
			return wire.Custodian{}, kms.Errorf(kms.Unavailable, "the release that node %s runs has not announced that it knows suspensions of credentials; start the node, with a newer release if need be", lacking[0])
		}
		_, err := e.write(ctx, st, rq, q, func(a attempt) (state.Result, error) {
			return e.submit(ctx, a, state.SuspendCredential{Statement: s})
		})
		if err != nil {
			return wire.Custodian{}, err
		}
		now, _ := e.cluster.State().Custodian(id)
		return custodianView(now), nil
	})
}

// custodianParams are the parameters of a change of a custodian.
func custodianParams(q wire.ProposalParameters) approval.CustodianParams {
	p := approval.CustodianParams{Custodian: custodianFromWire(*q.Custodian), Restore: q.Restore}
	for _, x := range q.Possession {
		p.Possession = append(p.Possession, approval.Possession(x))
	}
	p.Possession = approval.Possessions(p.Possession)
	return p
}

func custodianParamsView(p approval.CustodianParams) wire.ProposalParameters {
	c := custodianView(p.Custodian)
	v := wire.ProposalParameters{Custodian: &c, Restore: p.Restore}
	for _, x := range p.Possession {
		v.Possession = append(v.Possession, wire.Possession(x))
	}
	return v
}
