package audit

import (
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
)

// keyringForm checks that a keyring's creation is for exactly the nodes of its
// residency and hardware roots of theirs.
func (w *replay) keyringForm(what string, e signed, ring state.CreateKeyring) error {
	if ring.Protection == kms.Hardware {
		return nil // it has neither copies nor checks: parsing has refused others
	}
	nodes, ok := residentsOf(w, ring.Residency, ring.Checks, checkNode, true)
	if !ok || !w.rootsOf(e, nodes, ring.Copies) {
		return refuse(kms.Invalid, nil, "%s is not for exactly the nodes of its residency and their hardware", what)
	}
	return nil
}

func sameNodes[T any](nodes []state.Node, list []T, node func(T) string) bool {
	return slices.EqualFunc(nodes, list, func(n state.Node, x T) bool { return n.ID == node(x) })
}

// rootsOf reports whether copies are for exactly the nodes and roots that they have
// or had; for the node that signed them, the one that did.
func (w *replay) rootsOf(e signed, nodes []state.Node, copies []state.SealedCopy) bool {
	return slices.EqualFunc(nodes, copies, func(n state.Node, c state.SealedCopy) bool {
		own := n.ID != e.Origin || c.Root == e.root
		return n.ID == c.Node && own && w.nodes[n.ID].has(c.Root)
	})
}

// allowCopies refuses copies sealed with a suite that the policy of the decision forbids.
func (w *replay) allowCopies(p approval.Policy, copies []state.SealedCopy) error {
	for _, c := range copies {
		for _, r := range w.nodes[c.Node].roots {
			if r.number != c.Root {
				continue
			}
			if err := p.Allow(r.keys.Suite, "the agreement key of node "+c.Node); err != nil {
				return err
			}
		}
	}
	return nil
}

// verifyRotation verifies the commit and the receipts for it.
func (w *replay) verifyRotation(e Evidence, ring state.CreateKeyring, key state.CreateKey, out decided, r *Report) (err error) {
	what := "the execution of proposal " + r.Proposal
	env, commit := out.execution, out.commit
	if commit.Keyring != ring.Name || commit.Key != key.Name {
		return refuse(kms.Invalid, nil, "%s brings a version of %s", what, kms.KeyPath(commit.Keyring, commit.Key))
	}
	if err := w.residentOrigin(what, env, ring); err != nil {
		return err
	}
	r.Version = commit.Version
	var nodes []state.Node // that it was made for
	if ring.Protection == kms.Hardware {
		nodes, err = w.hardwareCommit(what, env, ring, commit, r)
	} else {
		nodes, err = w.softwareCommit(what, env.Origin, ring, commit, r)
	}
	if err != nil {
		return err
	}
	if err := checkKey(&key, commit); err != nil {
		return err
	}
	policy := w.policies[out.content.Policy]
	if err := policy.Allow(uint16(state.AlgorithmSuite(key.Algorithm)), "a key of the algorithm "+string(key.Algorithm)); err != nil {
		return err
	}
	if err := w.allowCopies(policy, commit.Copies); err != nil {
		return err
	}
	for i, d := range e.Later {
		if err := w.replayGovernance(d, r); err != nil {
			return refuse(kms.KindOf(err), err, "later decision %d: %v", i+1, err)
		}
	}
	if r.Receipts, err = w.verifyReceipts(e, key, out); err != nil {
		return err
	}
	if missing := unproven(w.stillMembers(nodes), ring, r.Receipts); len(missing) > 0 {
		return refuse(kms.Conflict, nil, "version %d is not proven: receipts of %s are missing by the rule %s", commit.Version, list(missing), ring.Receipts)
	}
	how := "showing its key check value"
	if signsReceipts(commit) {
		how = "signing with the new version itself"
	}
	r.passed("Nodes %s proved with signed receipts, %s, that they can use it, which meets the rule %s.", list(r.Receipts), how, ring.Receipts)
	return nil
}

func (w *replay) softwareCommit(what, origin string, ring state.CreateKeyring, commit state.CommitRotation, r *Report) ([]state.Node, error) {
	if len(commit.Copies) != 0 {
		return nil, refuse(kms.Invalid, nil, "%s brings a version of protection %s for a keyring of protection %s", what, kms.Hardware, ring.Protection)
	}
	nodes, exact := residentsOf(w, ring.Residency, commit.Checks, checkNode, false)
	if !exact {
		return nil, refuse(kms.Invalid, nil, "%s does not ask exactly the resident nodes for receipts", what)
	}
	r.passed("Node %s, resident for keyring %s, committed version %d (wrapped material SHA-256 %x).", origin, ring.Name, commit.Version, sha256.Sum256(commit.Wrapped))
	return nodes, nil
}

func (w *replay) hardwareCommit(what string, e signed, ring state.CreateKeyring, commit state.CommitRotation, r *Report) ([]state.Node, error) {
	if len(commit.Copies) == 0 {
		return nil, refuse(kms.Invalid, nil, "%s brings a version of protection %s for a keyring of protection %s", what, kms.Software, ring.Protection)
	}
	nodes, exact := residentsOf(w, ring.Residency, commit.Copies, copyNode, false)
	switch {
	case !exact || !w.rootsOf(e, nodes, commit.Copies):
		return nil, refuse(kms.Invalid, nil, "%s has not exactly one copy for the hardware of every resident node", what)
	case !signsReceipts(commit) && !sameNodes(nodes, commit.Checks, checkNode):
		return nil, refuse(kms.Invalid, nil, "%s does not ask exactly the resident nodes for receipts", what)
	case signsReceipts(commit) && len(commit.Checks) != 0:
		return nil, refuse(kms.Invalid, nil, "%s has checks, but the receipts of a sign key are signatures", what)
	}
	r.Generated = commit.Generated
	r.passed("Node %s, resident for keyring %s, committed version %d, %s for the devices of %s (sealed copies SHA-256 %x).",
		e.Origin, ring.Name, commit.Version, generated(commit.Generated, e.Origin), list(names(nodes)), sha256.Sum256(canon.Marshal(commit.Copies)))
	r.Notes = append(r.Notes, "Where the material was generated is the word of node "+e.Origin+"; what its device is, its attestation shows, if it has one.")
	return nodes, nil
}

// generated says where the material of a version was made.
func generated(g kms.Generated, origin string) string {
	if g == kms.InDevice {
		return "generated in the device of node " + origin + " and wrapped there"
	}
	return "generated in locked memory of node " + origin + " and wrapped there"
}

func names(nodes []state.Node) (l []string) {
	for _, n := range nodes {
		l = append(l, n.ID)
	}
	return l
}

// signsReceipts reports whether the receipts for a version are its own signatures.
func signsReceipts(c state.CommitRotation) bool { return len(c.Copies) > 0 && len(c.PublicKey) > 0 }

// checkKey holds the commit against the key. Where the command that created it is
// erased, the public key says which algorithm it is, and the identifier is that
// which the receipts' signatures confirm.
func checkKey(key *state.CreateKey, commit state.CommitRotation) error {
	switch {
	case key.Algorithm == "" && signsReceipts(commit):
		if len(key.ID) != len(kms.KeyID{}) {
			return refuse(kms.Invalid, nil, "the evidence does not say the identifier of key %s", kms.KeyPath(key.Keyring, key.Name))
		}
		key.Algorithm = kms.ECDSAP256
		if len(commit.PublicKey) > 65 { // an uncompressed point of P-256
			key.Algorithm = kms.ECDSAP384
		}
	case key.Algorithm == "" && len(key.ID) != 0:
		return refuse(kms.Invalid, nil, "the evidence holds a key's identifier that nothing confirms")
	case key.Algorithm != "" && (key.Purpose == kms.Sign) != (len(commit.PublicKey) > 0):
		return refuse(kms.Invalid, nil, "version %d has not the form of a key that is for %q", commit.Version, key.Purpose)
	}
	return nil
}

func (w *replay) verifyReceipts(e Evidence, key state.CreateKey, out decided) (given []string, err error) {
	commit, last := out.commit, ""
	for i, raw := range e.Receipts {
		what := fmt.Sprintf("receipt %d", i+1)
		env, c, err := command[state.GiveReceipt](w, what, raw)
		if err != nil {
			return nil, err
		}
		if env.Origin <= last {
			return nil, refuse(kms.Invalid, nil, "the receipts are not sorted by node or repeat that of %s", env.Origin)
		}
		last = env.Origin
		if c.Keyring != commit.Keyring || c.Key != commit.Key || c.Version != commit.Version {
			return nil, refuse(kms.Invalid, nil, "the receipt of node %s is for another version", env.Origin)
		}
		if err := w.inOrder(what, out.execution, env); err != nil {
			return nil, err
		}
		if err := w.verifyReceipt(env.Origin, c, key, commit); err != nil {
			return nil, err
		}
		given = append(given, env.Origin)
	}
	return given, nil
}

// verifyReceipt checks that a receipt shows the key of the version committed: by
// the key check value, or by a signature of the version.
func (w *replay) verifyReceipt(node string, c state.GiveReceipt, key state.CreateKey, commit state.CommitRotation) error {
	if signsReceipts(commit) {
		if !slices.ContainsFunc(commit.Copies, func(x state.SealedCopy) bool { return x.Node == node }) {
			return refuse(kms.Invalid, nil, "node %s, which gave a receipt, has no copy of the version committed", node)
		}
		message := kms.ReceiptMessage(w.cluster, c.Keyring, kms.KeyID(key.ID), c.Version, node)
		if err := kms.VerifyReceipt(key.Algorithm, commit.PublicKey, message, c.KCV); err != nil {
			return refuse(kms.KindOf(err), err, "the receipt of node %s: %v", node, err)
		}
		return nil
	}
	sum := sha256.Sum256(c.KCV)
	for _, check := range commit.Checks {
		if check.Node == node && subtle.ConstantTimeCompare(sum[:], check.Hash) == 1 {
			return nil
		}
	}
	return refuse(kms.Invalid, nil, "the receipt of node %s does not show the key of the version committed", node)
}
