package engine

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// leadTime is how long before a rotation is due its proposal is opened: a tenth
// of the period, at most a week.
func leadTime(period int64) int64 { return min(period/10, (7 * 24 * time.Hour).Milliseconds()) }

const (
	scheduleEvery = time.Minute    // between looks for due rotations
	reopenAfter   = 24 * time.Hour // after a proposal to rotate the same key was closed or expired

	scheduleTask = "schedule/" // begins the names of these tasks
)

// schedule opens proposals for the rotations that are due soon, on this node's
// own behalf. Custodians still decide.
func (a *Agent) schedule(ctx context.Context, st *state.State) time.Duration {
	now := a.e.now()
	if wait := a.scheduled.Add(scheduleEvery).Sub(now); wait > 0 && !a.scheduled.IsZero() {
		// Tasks not looked at in this pass keep their back-off.
		for name, t := range a.tasks {
			if strings.HasPrefix(name, scheduleTask) {
				t.pass = a.pass
			}
		}
		return wait
	}
	a.scheduled = now
	for _, kr := range st.Keyrings() {
		if !st.Resident(kr.Name, a.e.node) {
			continue
		}
		policy, _ := st.Policy(kr.Policy)
		if r, ok := policy.Rule(kms.ActionRotate); !ok || !r.Quorum() {
			continue
		}
		a.scheduleKEK(ctx, st, kr)
		for _, k := range st.Keys(kr.Name) {
			if !a.due(st, k) {
				continue
			}
			rank, _ := place(st.ResidentNodes(kr.Name), kms.KeyPath(k.Keyring, k.Name), a.e.node)
			a.attempt(ctx, "schedule", scheduleTask+kms.KeyPath(k.Keyring, k.Name), time.Duration(rank)*scheduleEvery,
				func(ctx context.Context) error { return a.propose(ctx, st, k) })
		}
	}
	return scheduleEvery
}

// due reports whether a key's rotation is due soon and nobody has proposed it.
func (a *Agent) due(st *state.State, k state.Key) bool {
	at := rotationDue(k)
	if at == 0 || k.Suspended || st.Clock() < at-leadTime(k.RotationPeriod) {
		return false
	}
	target := approval.KeyTarget(k.Keyring, k.Name)
	return !slices.ContainsFunc(st.ProposalsOn(target), func(p state.Proposal) bool {
		if p.Content.Action != kms.ActionRotate {
			return false
		}
		ended := p.ClosedAt
		if ended == 0 {
			ended = min(p.Content.Expires, st.Clock()) // still open, or expired
		}
		return st.Clock()-ended < reopenAfter.Milliseconds()
	})
}

// propose opens the proposal for a scheduled rotation.
func (a *Agent) propose(ctx context.Context, st *state.State, k state.Key) error {
	return a.open(ctx, st, wire.OpenProposalRequest{
		Action: string(kms.ActionRotate), Target: approval.KeyTarget(k.Keyring, k.Name),
		Reason: fmt.Sprintf("Scheduled rotation: the period of %s ends at %s.", duration(k.RotationPeriod), at(rotationDue(k)).Format(time.RFC3339)),
	})
}
