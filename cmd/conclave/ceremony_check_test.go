package main

import (
	"context"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/kms/wire"
)

// TestCeremonyForApprovedHardware: a node cannot have a ceremony give keys to hardware that
// custodians have not approved for that node, or to a node that is not of the residency.
func TestCeremonyForApprovedHardware(t *testing.T) {
	w := statetest.New(t, statetest.Options{})
	w.CreateKeyring("paris", "fr")
	w.GiveReceipts()
	w.Announce()
	params := w.RecoveryParams([]string{"fr"}, 3, 2, "de-1", "fr-1", "fr-2", "jp-1")
	set := w.SetRecovery("paris", params)
	w.Replace("node-fr-1", false)
	w.Replace("node-de-1", false)
	st := w.State()
	ask := func(_ context.Context, id string) ([]byte, error) {
		e, err := audit.BuildEvidence(st, id)
		if err != nil {
			return nil, err
		}
		return e.Marshal(), nil
	}
	root := func(node string) wire.RecoveryRoot {
		r, _ := st.Replacement(node)
		return wire.RecoveryRoot{Node: node, Root: r.Root, Suite: r.New.Suite, Agreement: r.New.Agreement, Proposal: r.Proposal}
	}
	key := wire.RecoveryKey{Name: "paris", Number: 1, Residency: params.Residency, Params: params.Marshal(), Proposal: set, Roots: []wire.RecoveryRoot{root("node-fr-1")}}
	if err := approvedByCustodians(t.Context(), ask, st.Cluster(), key, params); err != nil {
		t.Fatal(err)
	}
	thief := w.NewRoot("node-fr-1").Record.Agreement
	for name, change := range map[string]func(*wire.RecoveryKey, *approval.RecoveryParams){
		"another agreement key":  func(k *wire.RecoveryKey, _ *approval.RecoveryParams) { k.Roots[0].Agreement = thief },
		"another number":         func(k *wire.RecoveryKey, _ *approval.RecoveryParams) { k.Roots[0].Root++ },
		"another suite":          func(k *wire.RecoveryKey, _ *approval.RecoveryParams) { k.Roots[0].Suite++ },
		"no proposal":            func(k *wire.RecoveryKey, _ *approval.RecoveryParams) { k.Roots[0].Proposal = "" },
		"another proposal":       func(k *wire.RecoveryKey, _ *approval.RecoveryParams) { k.Roots[0].Proposal = set },
		"a node of another site": func(k *wire.RecoveryKey, _ *approval.RecoveryParams) { k.Roots[0] = root("node-de-1") },
		"a node of another site in the name of this one": func(k *wire.RecoveryKey, _ *approval.RecoveryParams) {
			k.Roots[0] = root("node-de-1")
			k.Roots[0].Node = "node-fr-1"
		},
		"another residency": func(k *wire.RecoveryKey, p *approval.RecoveryParams) {
			p.Residency = []string{"de", "fr"}
			k.Params, k.Roots[0] = p.Marshal(), root("node-de-1")
		},
		"the proposal of a root for the key": func(k *wire.RecoveryKey, _ *approval.RecoveryParams) { k.Proposal = k.Roots[0].Proposal },
	} {
		k, p := key, params
		k.Roots = []wire.RecoveryRoot{key.Roots[0]}
		change(&k, &p)
		if err := approvedByCustodians(t.Context(), ask, st.Cluster(), k, p); err == nil {
			t.Errorf("%s is taken for approved", name)
		}
	}
	// A cluster that a node has made up has another identity.
	if err := approvedByCustodians(t.Context(), ask, someCluster, key, params); kms.KindOf(err) != kms.Denied {
		t.Errorf("evidence of another cluster: %v", err)
	}
}
