package statetest

import (
	"cmp"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
)

// CommitKEKCommand returns the command that brings the KEK version that an authorised
// proposal asks for.
func (w *World) CommitKEKCommand(id string) state.CommitKEK {
	w.t.Helper()
	s := w.State()
	p, _ := s.Proposal(id)
	_, ring, _ := approval.ParseTarget(p.Content.Target)
	newest, ok := s.NewestKEK(ring)
	if !ok {
		w.t.Fatalf("keyring %s has no KEK", ring)
	}
	c := state.CommitKEK{Proposal: id, Keyring: ring, Version: newest.Version + 1}
	nodes := s.ResidentNodes(ring)
	for _, n := range nodes {
		c.Copies = append(c.Copies, state.SealedCopy{Node: n.ID, Root: n.Root, Sealed: hash("kek", ring, c.Version, n.ID, n.Root)})
	}
	c.Checks = w.opts.Hooks.checks(ring, "", c.Version, nodes)
	return c
}

// ProposeKEK has a rotation of a keyring's KEK approved and returns the proposal.
func (w *World) ProposeKEK(ring string) string {
	w.t.Helper()
	id := w.Propose(kms.ActionRotate, approval.KeyringTarget(ring), nil)
	w.ApproveAll(id)
	return id
}

// CommitKEK commits an approved rotation of a KEK by the first resident node.
func (w *World) CommitKEK(id string) state.Result {
	w.t.Helper()
	c := w.CommitKEKCommand(id)
	p, _ := w.State().Proposal(id)
	return w.Do(w.State().ResidentNodes(c.Keyring)[0].ID, c, Expect(p.Content.Revision))
}

// RewrapCommand returns the command by which a node rewraps up to n key versions.
func (w *World) RewrapCommand(node, ring string, n int) state.Rewrap {
	w.t.Helper()
	k, _ := w.State().Keyring(ring)
	c := state.Rewrap{Keyring: ring, KEK: k.KEK}
	w.State().ToRewrap(ring, func(v state.Version) bool {
		c.Items = append(c.Items, state.RewrapItem{Key: v.Key, Version: v.Version, Wrapped: hash("rewrapped", ring, v.Key, v.Version, k.KEK, node)})
		return len(c.Items) < n
	})
	slices.SortFunc(c.Items, func(a, b state.RewrapItem) int {
		return cmp.Or(strings.Compare(a.Key, b.Key), cmp.Compare(a.Version, b.Version))
	})
	return w.SignRewrap(node, c)
}

// SignRewrap signs the manifest of a Rewrap anew.
func (w *World) SignRewrap(node string, c state.Rewrap) state.Rewrap {
	w.t.Helper()
	m := state.RewrapManifest(w.State().Cluster(), c.Keyring, node, c.KEK, state.RewrapEntries(c.Items))
	c.Signature = w.Node(node).signature(w.t, m, state.RewrapContext)
	return c
}

// ConfirmRewrapCommand and RefuseRewrapCommand return what a node says of a batch.
func ConfirmRewrapCommand(b state.RewrapBatch) state.ConfirmRewrap {
	return state.ConfirmRewrap{Keyring: b.Keyring, KEK: b.KEK, Batch: b.Index, Digest: b.Digest}
}

func RefuseRewrapCommand(b state.RewrapBatch) state.RefuseRewrap {
	return state.RefuseRewrap{
		Keyring: b.Keyring, KEK: b.KEK, Batch: b.Index, Digest: b.Digest, By: b.Origin, Key: b.Entries[0].Key, Version: b.Entries[0].Version,
	}
}

// Rewrap has a node rewrap up to n key versions and returns the batch.
func (w *World) Rewrap(node, ring string, n int) state.RewrapBatch {
	w.t.Helper()
	r := w.Do(node, w.RewrapCommand(node, ring, n))
	k, _ := w.State().Keyring(ring)
	b, ok := w.State().Batch(ring, k.KEK, r.Index)
	if !ok {
		w.t.Fatal("the batch is not in the state")
	}
	return b
}

// Confirm has every resident node that has not yet done so confirm a keyring's open batches.
func (w *World) Confirm(ring string) {
	w.t.Helper()
	for _, b := range w.State().OpenBatches(ring) {
		for _, n := range w.State().ResidentNodes(ring) {
			if !b.ConfirmedBy(n.ID) {
				w.Do(n.ID, ConfirmRewrapCommand(b))
			}
		}
	}
}

// Retire retires the KEK versions of a keyring that wrap nothing any more.
func (w *World) Retire(ring string) {
	w.t.Helper()
	for _, v := range w.State().Retirable(ring) {
		w.Do(w.State().ResidentNodes(ring)[0].ID, state.RetireKEK{Keyring: ring, Version: v})
	}
}

// FinishKEK rewraps, confirms and retires until a keyring has one KEK version left.
func (w *World) FinishKEK(ring string) {
	w.t.Helper()
	node := w.State().ResidentNodes(ring)[0].ID
	for left := true; left; {
		left = false
		w.State().ToRewrap(ring, func(state.Version) bool { left = true; return false })
		if left {
			w.Rewrap(node, ring, 2)
			w.Confirm(ring)
		}
	}
	w.Confirm(ring)
	w.Retire(ring)
}

// RotateKEK rotates a keyring's KEK from proposal to retirement and returns the proposal.
func (w *World) RotateKEK(ring string) string {
	w.t.Helper()
	id := w.ProposeKEK(ring)
	w.CommitKEK(id)
	w.GiveReceipts()
	w.FinishKEK(ring)
	return id
}
