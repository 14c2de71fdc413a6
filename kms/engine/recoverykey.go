package engine

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
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

// RecoveryKeys lists the recovery keys that are in use or still open something, with
// what a ceremony needs: all of it is sealed or public.
func (e *Engine) RecoveryKeys(ctx context.Context, c Caller) (wire.RecoveryKeys, error) {
	return read(ctx, e, c, ActReadCluster, resource{}, "recovery-keys", func(st *state.State) (wire.RecoveryKeys, error) {
		out := wire.RecoveryKeys{Keys: []wire.RecoveryKey{}}
		for _, k := range st.AllRecoveryKeys() {
			v := recoveryKeyView(st, k)
			if now, _ := st.RecoveryKeyOf(k.Name); now.Number == k.Number || len(v.KEKs) > 0 {
				out.Keys = append(out.Keys, v)
			}
		}
		return out, nil
	})
}

func recoveryKeyView(st *state.State, k state.RecoveryKey) wire.RecoveryKey {
	v := wire.RecoveryKey{
		Name: k.Name, Number: k.Number, Residency: k.Params.Residency, Threshold: k.Params.Threshold, Sites: k.Params.Sites,
		Params: k.Params.Marshal(), Proposal: k.Proposal, Time: at(k.Time), KEKs: []wire.RecoverableKEK{}, Roots: []wire.RecoveryRoot{},
	}
	for _, h := range k.Params.Holders {
		v.Holders = append(v.Holders, wire.RecoveryHolder{Custodian: h.Custodian, Site: h.Site})
	}
	for _, kr := range st.Keyrings() {
		if kr.Protection == kms.Hardware || !slices.Equal(kr.Residency, k.Params.Residency) {
			continue
		}
		for _, kek := range st.KEKs(kr.Name) {
			x := wire.RecoverableKEK{Keyring: kr.Name, Version: kek.Version}
			for _, c := range st.RecoveryCopies(kr.Name, kek.Version) {
				if c.Number == k.Number {
					x.Copies = append(x.Copies, wire.SiteCopy{Site: c.Site, Node: c.Node, Sealed: c.Sealed})
				}
			}
			for _, c := range kek.Checks {
				x.Checks = append(x.Checks, wire.NodeCheck{Node: c.Node, Hash: c.Hash})
			}
			if len(x.Copies) > 0 {
				v.KEKs = append(v.KEKs, x)
			}
		}
	}
	for _, r := range st.Replacements() {
		if n, _ := st.Node(r.Node); slices.Contains(k.Params.Residency, n.Site) {
			v.Roots = append(v.Roots, wire.RecoveryRoot{Node: r.Node, Root: r.Root, Suite: r.New.Suite, Agreement: r.New.Agreement, Proposal: r.Proposal})
		}
	}
	return v
}

// Restore hands the cluster what came out of a recovery ceremony. Its authority are the
// custodians' signatures in it, which every node checks, so whoever may submit
// custodians' statements may submit it. What a root has already is passed over. Errors:
// kms.Invalid, kms.BadSignature, kms.Denied, kms.NeedsApproval, kms.Expired,
// kms.Conflict, and those of every write.
func (e *Engine) Restore(ctx context.Context, c Caller, q wire.RestoreRequest) (wire.RestoreResponse, error) {
	rq := &request{caller: c, act: ActVote, about: "ceremony"}
	return do(ctx, e, rq, func(st *state.State) (wire.RestoreResponse, error) {
		var out wire.RestoreResponse
		if len(q.Restored) == 0 || len(q.Restored) > maxRestored {
			return out, kms.Errorf(kms.Invalid, "there are %d copies from the ceremony; 1 to %d can be handed in at once", len(q.Restored), maxRestored)
		}
		cmd := state.RestoreCopy{Ceremony: q.Ceremony}
		for _, x := range q.Consents {
			cmd.Consents = append(cmd.Consents, approval.Consent{Custodian: x.Custodian, Credential: x.Credential, Share: x.Share, Signature: x.Signature})
		}
		for _, x := range q.Restored {
			cmd.Node, cmd.Root, cmd.Keyring, cmd.Version, cmd.Sealed, cmd.Signature = x.Node, x.Root, x.Keyring, x.Version, x.Sealed, x.Signature
			_, err := e.submit(ctx, attempt{principal: c.Identity.String()}, cmd)
			rq.written = rq.written || err == nil || kms.KindOf(err) == kms.Unknown
			switch {
			case err == nil:
				out.Taken++
			case kms.KindOf(err) != kms.Exists:
				return out, err
			}
		}
		return out, nil
	})
}

// maxRestored bounds a request with what came out of a ceremony.
const maxRestored = 256
