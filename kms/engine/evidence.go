package engine

import (
	"context"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// Evidence returns the evidence file of an executed proposal (kms/audit).
func (e *Engine) Evidence(ctx context.Context, c Caller, id string) (wire.Evidence, error) {
	return read(ctx, e, c, ActReadEvidence, resource{}, aboutProposal(id), func(st *state.State) (wire.Evidence, error) {
		if _, ok := st.Proposal(id); !ok {
			return nil, noProposal(id)
		}
		return nil, kms.Errorf(kms.Unavailable, "evidence cannot be built yet")
	})
}
