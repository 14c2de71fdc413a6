package engine

import (
	"context"

	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// Evidence returns the evidence file of an executed proposal: everything that
// kms/audit needs to verify offline that it was authorised. Errors: kms.Denied,
// kms.NotFound, kms.Conflict for a proposal that was not carried out.
func (e *Engine) Evidence(ctx context.Context, c Caller, id string) (wire.Evidence, error) {
	return read(ctx, e, c, ActReadEvidence, resource{}, aboutProposal(id), func(st *state.State) (wire.Evidence, error) {
		if _, ok := st.Proposal(id); !ok {
			return nil, noProposal(id)
		}
		ev, err := audit.BuildEvidence(st, id)
		if err != nil {
			return nil, err
		}
		return ev.Marshal(), nil
	})
}
