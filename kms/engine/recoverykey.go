package engine

import (
	"context"
	"fmt"
	"time"

	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/state"
)

// sealRecovery gives the copies for recovery keys that this node's site owes: one for
// each KEK version, after the key was set, after a keyring was made and after its KEK
// was rotated. The nodes of the site take turns.
func (a *Agent) sealRecovery(ctx context.Context, st *state.State) time.Duration {
	wait := idleWait
	owed := st.Unrecoverable(a.e.node)
	if len(owed) == 0 {
		return wait
	}
	self, _ := st.Node(a.e.node)
	for _, p := range owed[:min(len(owed), resealsInPass)] {
		name := fmt.Sprintf("recovery/%s/%d", p.Keyring, p.Version)
		rank, _ := place(st.NodesOf(self.Site), name, a.e.node)
		wait = min(wait, a.attempt(ctx, "recovery", name, time.Duration(rank)*a.cfg.RankDelay, func(ctx context.Context) error {
			st := a.e.cluster.State()
			key, ok := st.RecoveryFor(p.Keyring)
			if !ok {
				return nil
			}
			to := keyring.Recipient{Node: approval.RecoveryRecipient(key.Name), Suite: key.Params.Suite, PublicKey: key.Params.PublicKey}
			sealed, err := a.resealKEK(ctx, st, p, to)
			if err != nil {
				return err
			}
			_, err = a.e.submit(ctx, attempt{}, state.SealRecovery{Keyring: p.Keyring, Version: p.Version, Recovery: key.Name, Number: key.Number, Sealed: sealed})
			return err
		}))
	}
	return wait
}
