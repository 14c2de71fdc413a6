package engine

import (
	"context"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// Proposals lists a page of the proposals that a query selects, newest first. Errors:
// kms.Invalid, and kms.NotFound for a custodian that does not exist.
func (e *Engine) Proposals(ctx context.Context, c Caller, q wire.ProposalQuery) (wire.Proposals, error) {
	return read(ctx, e, c, ActReadProposal, resource{}, "proposals", func(st *state.State) (wire.Proposals, error) {
		if err := checkQuery(st, &q); err != nil {
			return wire.Proposals{}, err
		}
		list, more := st.ProposalsBy(state.ProposalQuery{
			Open: q.Open, Action: kms.Action(q.Action), Target: q.Target, Waits: q.WaitsFor, Before: q.Before, Limit: q.Limit,
		})
		out := wire.Proposals{Proposals: make([]wire.Proposal, 0, len(list))}
		for _, p := range list {
			v, err := proposalView(st, p)
			if err != nil {
				return wire.Proposals{}, err
			}
			out.Proposals = append(out.Proposals, v)
		}
		if more {
			out.Next = list[len(list)-1].Index
		}
		return out, nil
	})
}

// checkQuery refuses what selects nothing by mistake, and sets the limit of a page.
func checkQuery(st *state.State, q *wire.ProposalQuery) error {
	if q.Limit < 0 || q.Limit > wire.MaxProposals {
		return kms.Errorf(kms.Invalid, "limit is %d; a page has 1 to %d proposals", q.Limit, wire.MaxProposals)
	}
	if q.Limit == 0 {
		q.Limit = wire.MaxProposals
	}
	if q.Target != "" {
		if _, _, err := approval.ParseTarget(q.Target); err != nil {
			return err
		}
	}
	if q.WaitsFor == "" {
		return nil
	}
	if _, ok := st.Custodian(q.WaitsFor); !ok {
		return kms.Errorf(kms.NotFound, "there is no custodian %q", q.WaitsFor)
	}
	return nil
}
