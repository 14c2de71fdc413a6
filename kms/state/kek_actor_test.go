package state_test

import (
	"pgregory.net/rapid"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// rotateKEK brings a rotation of the KEK of ring on, or begins one.
func (a *actor) rotateKEK(t *rapid.T, node string) []byte {
	w, s := a.w, a.w.State()
	for _, p := range s.ProposalsOpen() {
		if p.Content.Target == approval.KeyringTarget("ring") {
			if p.Progress == state.Authorised {
				return a.execution(node, p)
			}
			by := rapid.SampledFrom([]string{"fr-1", "de-1", "jp-1"}).Draw(t, "custodian")
			return w.Command(node, state.CastVote{Statement: w.Statement(p.ID, by, approval.Approve)}, now(s))
		}
	}
	if !s.Rotating("ring") {
		p := w.Proposal(kms.ActionRotate, approval.KeyringTarget("ring"), nil)
		p.Created = s.Clock()
		p.Expires = p.Created + 24*3600_000
		return w.Command(node, state.OpenProposal{Proposal: p.Marshal()}, statetest.As(p.Proposer), now(s))
	}
	newest, _ := s.NewestKEK("ring")
	if k, _ := s.Keyring("ring"); newest.Version != k.KEK {
		return w.Command(node, w.ReceiptCommand(node, "ring", "", newest.Version), now(s))
	}
	switch batches := s.OpenBatches("ring"); {
	case len(batches) == 0 || rapid.IntRange(0, 4).Draw(t, "another batch") == 0:
		if c := w.RewrapCommand(node, "ring", 2); len(c.Items) > 0 {
			return w.Command(node, c, now(s))
		}
		old := rapid.Uint32Range(1, newest.Version).Draw(t, "retired")
		return w.Command(node, state.RetireKEK{Keyring: "ring", Version: old}, now(s))
	case rapid.IntRange(0, 9).Draw(t, "refuse") == 0:
		return w.Command(node, statetest.RefuseRewrapCommand(batches[0]), now(s))
	default:
		return w.Command(node, statetest.ConfirmRewrapCommand(batches[0]), now(s))
	}
}

// checkKEKs holds the invariants of KEKs: what a key version in use is wrapped under is
// not retired, every KEK version in use has been shown by every node, and what is
// rewrapped and not yet in use belongs to a batch.
func checkKEKs(t *rapid.T, s *state.State) {
	k, _ := s.Keyring("ring")
	for _, kek := range s.KEKs("ring") {
		if kek.Version > 1 && kek.Version <= k.KEK && kek.Activated == 0 && kek.Version == k.KEK {
			t.Fatalf("KEK version %d is primary and was never activated", kek.Version)
		}
		if kek.Version == k.KEK && kek.Version > 1 && len(kek.Receipts) != 3 {
			t.Fatalf("KEK version %d is primary with %d receipts", kek.Version, len(kek.Receipts))
		}
		if kek.Retired() && kek.Version >= k.KEK {
			t.Fatalf("KEK version %d is retired and not old", kek.Version)
		}
	}
	left := 0
	for _, key := range s.Keys("ring") {
		for _, v := range s.Versions("ring", key.Name) {
			if v.State.Gone() {
				if v.Next != nil || v.Made != 0 {
					t.Fatalf("version %d of %s is destroyed: %+v", v.Version, key.Name, v)
				}
				continue
			}
			if kek, ok := s.KEK("ring", v.KEK); !ok || kek.Retired() || v.KEK > k.KEK {
				t.Fatalf("version %d of %s is under KEK version %d", v.Version, key.Name, v.KEK)
			}
			if v.Next != nil {
				b, ok := s.Batch("ring", v.Next.KEK, v.Next.Batch)
				if !ok || b.Done || v.Next.KEK <= v.KEK || len(b.Confirmed) > 2 && v.Next.KEK == k.KEK {
					t.Fatalf("version %d of %s is to be %+v, of %+v", v.Version, key.Name, v.Next, b)
				}
			}
			if v.KEK < k.KEK && (v.Next == nil || v.Next.KEK < k.KEK) {
				left++
			}
		}
	}
	s.ToRewrap("ring", func(state.Version) bool { left--; return true })
	if left != 0 {
		t.Fatalf("what is to be rewrapped is off by %d", left)
	}
}
