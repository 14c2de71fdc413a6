package engine

import (
	"context"
	"slices"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// scheduleKEK opens the proposal to rotate a keyring's KEK that a removed node could
// open. Custodians decide as on any other.
func (a *Agent) scheduleKEK(ctx context.Context, st *state.State, kr state.Keyring) {
	gone, wanted := st.RotationWanted(kr.Name)
	if !wanted {
		return
	}
	removal, _ := st.Removal(gone)
	if a.proposedKEK(st, kr.Name, removal.Index) {
		return
	}
	rank, _ := place(st.ResidentNodes(kr.Name), approval.KeyringTarget(kr.Name), a.e.node)
	a.attempt(ctx, "schedule", scheduleTask+approval.KeyringTarget(kr.Name), time.Duration(rank)*scheduleEvery, func(ctx context.Context) error {
		return a.open(ctx, st, wire.OpenProposalRequest{
			Action: string(kms.ActionRotate), Target: approval.KeyringTarget(kr.Name),
			Reason: "Node " + gone + " was removed. It could open the key-encryption key of keyring " + kr.Name + "; new keys must be out of its reach.",
		})
	})
}

// proposedKEK reports whether a proposal to rotate a keyring's KEK is still open, or
// one that was opened after a place in the log was closed not long ago.
func (a *Agent) proposedKEK(st *state.State, ring string, index uint64) bool {
	return slices.ContainsFunc(st.ProposalsOn(approval.KeyringTarget(ring)), func(p state.Proposal) bool {
		if p.Content.Action != kms.ActionRotate {
			return false
		}
		if p.ClosedAt == 0 && st.Clock() < p.Content.Expires {
			return true
		}
		ended := p.ClosedAt
		if ended == 0 {
			ended = p.Content.Expires
		}
		return p.Index > index && p.Progress != state.Void && st.Clock()-ended < reopenAfter.Milliseconds()
	})
}

// open opens a proposal as this node.
func (a *Agent) open(ctx context.Context, st *state.State, q wire.OpenProposalRequest) error {
	self := a.e.self(st)
	if self.TrustDomain == "" {
		return kms.Errorf(kms.Internal, "node %s has no site", a.e.node)
	}
	p, err := a.e.newProposal(st, Caller{Identity: self}, q)
	if err != nil {
		return err
	}
	_, err = a.e.submit(ctx, attempt{}, state.OpenProposal{Proposal: p.Marshal()})
	return err
}
