package audit

import (
	"cmp"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/state"
)

// BuildEvidence collects the evidence for an executed proposal and verifies it.
// Errors: kms.NotFound for an unknown proposal and for a rotation whose version
// has been destroyed since; kms.Conflict for a proposal not carried out or a
// version whose receipts are not all in; kms.Internal if what was collected does
// not verify.
func BuildEvidence(s *state.State, proposalID string) (Evidence, error) {
	p, ok := s.Proposal(proposalID)
	switch {
	case !ok:
		return Evidence{}, kms.Errorf(kms.NotFound, "there is no proposal %s", proposalID)
	case p.Progress != state.Executed:
		return Evidence{}, kms.Errorf(kms.Conflict, "proposal %s is %s; there is evidence once it has been executed", proposalID, p.Progress)
	case len(p.Execution) == 0:
		return Evidence{}, kms.Errorf(kms.NotFound, "the version that proposal %s brought has been destroyed, and the command with it", proposalID)
	}
	w, err := newReplay(s.SignedGenesis())
	if err != nil {
		return Evidence{}, err
	}
	w.history.ahead = recoveriesOf(s)
	e := Evidence{Format: EvidenceFormat, Cluster: s.Cluster(), Genesis: s.SignedGenesis().Marshal(), Governance: []Decision{}}
	for _, g := range decisionsBefore(s, reach(s, p), p) {
		d := w.collect(s, g)
		switch {
		case g.ID == p.ID:
			e.Decision = d
			if !governs(g) {
				continue
			}
		case g.Executed < p.Executed:
			e.Governance = append(e.Governance, d)
		default:
			e.Later = append(e.Later, d)
		}
		out, err := w.decide(d)
		if err == nil {
			err = w.govern(out)
		}
		if err != nil {
			return Evidence{}, kms.Wrap(kms.Internal, err, "the decision "+g.ID+" does not verify: "+err.Error(), "compare this node's state with another's")
		}
	}
	if err := addTarget(s, p, &e); err != nil {
		return Evidence{}, err
	}
	if err := w.addRecoveries(s, &e); err != nil {
		return Evidence{}, err
	}
	if _, err := VerifyEvidence(e, s.Cluster()); err != nil {
		return Evidence{}, kms.Wrap(kms.Internal, err, "the evidence for proposal "+proposalID+" does not verify: "+err.Error(), "compare this node's state with another's")
	}
	return e, nil
}

// governs reports whether a proposal is about policies, custodians, nodes or sites.
func governs(p state.Proposal) bool {
	return slices.Contains([]kms.Action{kms.ActionPolicy, kms.ActionCustodian, kms.ActionNode, kms.ActionSite}, p.Content.Action)
}

// decisionsBefore returns a proposal and those that belong to its evidence, executed before a place
// in the log, in the order of their execution.
func decisionsBefore(s *state.State, index uint64, p state.Proposal) []state.Proposal {
	all := slices.DeleteFunc(s.Proposals(), func(x state.Proposal) bool {
		return x.ID != p.ID && (!belongs(x, p) || x.Progress != state.Executed || x.Executed >= index)
	})
	slices.SortFunc(all, func(a, b state.Proposal) int { return cmp.Compare(a.Executed, b.Executed) })
	return all
}

// reach returns the place in the log before which decisions belong to the evidence
// for a proposal: that of its execution, unless a receipt is signed with a hardware
// root that was approved later.
func reach(s *state.State, p state.Proposal) uint64 {
	limit := p.Executed
	kind, name, _ := approval.ParseTarget(p.Content.Target)
	if kind == approval.TargetKeyring {
		kek, _ := broughtKEK(s, p, name)
		return lateRemovals(s, p, name, kek.Receipts, lateRoots(s, p, kek.Receipts, limit))
	}
	ring, key, err := kms.SplitKeyPath(name)
	if err != nil || p.Content.Action != kms.ActionRotate {
		return limit
	}
	for _, v := range s.Versions(ring, key) {
		if v.Proposal == p.ID {
			limit = lateRemovals(s, p, ring, v.Receipts, lateRoots(s, p, v.Receipts, limit))
		}
	}
	return limit
}

// collect takes from a proposal's record what is signed. Votes that no longer
// counted when it was carried out, for the custodian or credential was gone, are
// left out.
func (w *replay) collect(s *state.State, p state.Proposal) Decision {
	d := Decision{Proposal: p.Bytes, Open: p.Statement, Execution: p.Execution}
	d.Votes = countable(p, w.collectSuspensions(s, p, &d))
	if kind, name, _ := approval.ParseTarget(p.Content.Target); kind == approval.TargetNode {
		for _, f := range s.FormerRoots(name) {
			if f.Proposal == p.ID {
				d.Adoption = f.Statement
			}
		}
	}
	return d
}

// addTarget adds what belongs to a decision about a key or a keyring.
func addTarget(s *state.State, p state.Proposal, e *Evidence) error {
	kind, name, err := approval.ParseTarget(p.Content.Target)
	if kind == approval.TargetKeyring {
		return addKEK(s, p, name, e)
	}
	if err != nil || kind != approval.TargetKey {
		return err
	}
	ringName, keyName, err := kms.SplitKeyPath(name)
	if err != nil {
		return err
	}
	ring, _ := s.Keyring(ringName)
	key, ok := s.Key(ringName, keyName)
	if !ok {
		return kms.Errorf(kms.NotFound, "there is no key %s", name)
	}
	e.Keyring, e.Key = ring.Statement, key.Statement
	if v, ok := s.Version(ringName, keyName, 1); ok && v.Proposal != "" {
		e.Key = nil // the decision to import it has the command
	}
	if p.Content.Action != kms.ActionRotate {
		return nil
	}
	i := slices.IndexFunc(s.Versions(ringName, keyName), func(v state.Version) bool { return v.Proposal == p.ID })
	if i < 0 {
		return kms.Errorf(kms.Internal, "proposal %s was executed and brought no version of %s", p.ID, name)
	}
	v := s.Versions(ringName, keyName)[i]
	if v.Generated != "" && len(v.PublicKey) > 0 && len(key.Statement) == 0 {
		e.KeyID = key.ID
	}
	var given []string
	for _, r := range v.Receipts {
		e.Receipts = append(e.Receipts, r.Statement)
		given = append(given, r.Node)
	}
	if missing := unproven(askedNodes(s, p, ringName), state.CreateKeyring{Residency: ring.Residency, Receipts: ring.Receipts}, given); len(missing) > 0 {
		return kms.Errorf(kms.Conflict, "version %d of %s waits for the receipts of %s; there is evidence once they are in", v.Version, name, list(missing))
	}
	return nil
}
