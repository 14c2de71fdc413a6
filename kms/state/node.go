package state

import (
	"bytes"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
)

// HardwareRoot returns the part of the record that changes with the hardware.
func (n Node) HardwareRoot() approval.NodeRoot {
	return approval.NodeRoot{
		Suite: n.Suite, Agreement: n.Agreement, SigningSuite: n.SigningSuite, Signing: n.Signing,
		Device: n.Device, ImportKind: n.ImportKind, Import: n.Import, Attestation: n.Attestation,
	}
}

// with returns the node with another root.
func (n Node) with(number uint32, r approval.NodeRoot) Node {
	n.Suite, n.Agreement, n.SigningSuite, n.Signing = r.Suite, r.Agreement, r.SigningSuite, r.Signing
	n.Device, n.ImportKind, n.Import, n.Attestation = r.Device, r.ImportKind, r.Import, r.Attestation
	n.Root = number
	n.Revision++
	return n
}

// nextRoot returns the number for the root that is proposed next, 1 for a node that
// is to join. A pending
// replacement keeps its number to itself, also when another takes its place, so
// that no copy sealed for the one is ever taken for the other.
func (r reader) nextRoot(node string) uint32 {
	if next, pending := r.replacement(node); pending {
		return next.Root + 1
	}
	n, _ := r.node(node)
	return n.Root + 1
}

// verifyRoot checks, for a proposal that brings a hardware root, that the holder of
// the new signing key agrees.
func (t *tx) verifyRoot(p approval.Proposal) error {
	if p.Action != kms.ActionNode {
		return nil
	}
	_, node, err := approval.ParseTarget(p.Target)
	if err != nil {
		return err
	}
	params, err := p.NodeParams()
	if err != nil || !params.HasRoot() {
		return err
	}
	r := t.reader()
	if _, ok := r.node(node); !ok && params.Change == approval.NodeReplaceRoot {
		return r.noNode(node)
	}
	if params.Change == approval.NodeJoin {
		if err := r.newNode(node); err != nil {
			return err
		}
	}
	return params.VerifyPossession(t.before.cluster, node, r.nextRoot(node))
}

// replaceRoot records the root that a node is to have next. One that was pending
// is given up, with the copies sealed to it.
func (t *tx) replaceRoot(id string, p approval.Proposal) error {
	params, err := p.NodeParams()
	if err != nil {
		return err
	}
	r := t.reader()
	n, ok := r.node(id)
	if !ok {
		return r.noNode(id)
	}
	if err := t.approveRoot(n, r.nextRoot(id), params, p); err != nil {
		return err
	}
	n.Revision++
	insert(t.Txn, tableNode, n)
	t.voidTarget(p.Target)
	t.event(Event{Type: EventNodeReplacing, Node: id, Proposal: approval.ProposalID(p.Marshal())})
	return nil
}

// approveRoot judges a hardware root and makes it the one that a node may adopt.
func (t *tx) approveRoot(n Node, number uint32, params approval.NodeParams, p approval.Proposal) error {
	r := t.reader()
	if err := r.governance().AllowRoot(n.ID, params.Root); err != nil {
		return err
	}
	if err := r.unusedKeys(n.ID, params.Root); err != nil {
		return err
	}
	report, err := r.attestNext(n, params.Root, t.clock, t.index)
	if err != nil {
		return err
	}
	if err := r.fitForKeyrings(n, params.Root, report); err != nil {
		return err
	}
	if old, pending := r.replacement(n.ID); pending {
		t.dropCopies(n.ID, old.Root)
	}
	insert(t.Txn, tableNext, Replacement{
		Node: n.ID, Root: number, New: params.Root, Leave: params.Leave,
		Proposal: approval.ProposalID(p.Marshal()), Time: t.clock, Index: t.index,
	})
	return nil
}

// unusedKeys refuses keys that are another node's, also of one that was removed, and
// a signing key that a root of any node had before.
func (r reader) unusedKeys(id string, root approval.NodeRoot) error {
	taken := func(node string, other approval.NodeRoot) error {
		if bytes.Equal(other.Signing, root.Signing) || bytes.Equal(other.Agreement, root.Agreement) {
			return kms.Errorf(kms.Conflict, "the new root has a key of node %s; a device serves one node", node)
		}
		return nil
	}
	nodes := r.nodes()
	for _, old := range r.removals() {
		nodes = append(nodes, old.Node)
	}
	for _, n := range nodes {
		if n.ID == id && bytes.Equal(n.Signing, root.Signing) {
			return kms.Errorf(kms.Conflict, "node %s has this signing key already; a new root has a new one", id)
		}
		if n.ID != id {
			if err := taken(n.ID, n.HardwareRoot()); err != nil {
				return err
			}
		}
		if next, pending := r.replacement(n.ID); pending && n.ID != id {
			if err := taken(n.ID, next.New); err != nil {
				return err
			}
		}
		for _, f := range r.formers(n.ID) {
			if bytes.Equal(f.Signing, root.Signing) {
				return kms.Errorf(kms.Conflict, "the signing key was that of node %s before, root number %d; it does not come back", f.Node, f.Root)
			}
		}
	}
	return nil
}
