package audit

import (
	"crypto/sha256"
	"crypto/subtle"
	"fmt"
	"slices"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
	"github.com/conclave-kms/conclave/kms/state"
)

// addKEK adds what belongs to a rotation of a keyring's KEK.
func addKEK(s *state.State, p state.Proposal, name string, e *Evidence) error {
	ring, ok := s.Keyring(name)
	if !ok {
		return kms.Errorf(kms.NotFound, "there is no keyring %s", name)
	}
	e.Keyring = ring.Statement
	kek, ok := broughtKEK(s, p, name)
	if !ok {
		return kms.Errorf(kms.Internal, "proposal %s was executed and brought no KEK version of keyring %s", p.ID, name)
	}
	var given []string
	for _, r := range kek.Receipts {
		e.Receipts = append(e.Receipts, r.Statement)
		given = append(given, r.Node)
	}
	if missing := unproven(askedNodes(s, p, name), state.CreateKeyring{Residency: ring.Residency, Receipts: ring.Receipts}, given); len(missing) > 0 {
		return kms.Errorf(kms.Conflict, "KEK version %d of keyring %s waits for the receipts of %s; there is evidence once they are in", kek.Version, name, list(missing))
	}
	return nil
}

// broughtKEK returns the KEK version that a proposal brought.
func broughtKEK(s *state.State, p state.Proposal, ring string) (state.KEK, bool) {
	all := s.KEKs(ring)
	if i := slices.IndexFunc(all, func(k state.KEK) bool { return k.Proposal == p.ID }); i >= 0 {
		return all[i], true
	}
	return state.KEK{}, false
}

// verifyKEK verifies the commit of a KEK version and the receipts for it.
func (w *replay) verifyKEK(e Evidence, name string, out decided, r *Report) error {
	if len(e.Key) != 0 || len(e.KeyID) != 0 || len(e.Decision.Adoption) != 0 {
		return refuse(kms.Invalid, nil, "the evidence holds commands on a key or a node, but %s is a keyring", r.Content.Target)
	}
	ring, created, err := w.verifyKeyring(e, name, r)
	if err != nil {
		return err
	}
	if err := w.inOrder("the opening of proposal "+out.id, created, out.open); err != nil {
		return err
	}
	what, commit := "the execution of proposal "+out.id, out.kek
	nodes, exact := residentsOf(w, ring.Residency, commit.Checks, checkNode, false)
	switch {
	case commit.Keyring != name:
		return refuse(kms.Invalid, nil, "%s brings a KEK of keyring %s", what, commit.Keyring)
	case ring.Protection == kms.Hardware:
		return refuse(kms.Invalid, nil, "%s brings a KEK of a keyring of protection %s", what, kms.Hardware)
	case !exact:
		return refuse(kms.Invalid, nil, "%s does not ask exactly the resident nodes for receipts", what)
	case !w.rootsOf(out.execution, nodes, commit.Copies):
		return refuse(kms.Invalid, nil, "%s has not exactly one copy for the hardware of every resident node", what)
	}
	if err := w.residentOrigin(what, out.execution, ring); err != nil {
		return err
	}
	if err := w.allowCopies(w.policies[out.content.Policy], commit.Copies); err != nil {
		return err
	}
	r.Version = commit.Version
	r.passed("Node %s, resident for keyring %s, committed KEK version %d, sealed to %s and nobody else (sealed copies SHA-256 %x).",
		out.execution.Origin, name, commit.Version, list(names(nodes)), sha256.Sum256(canon.Marshal(commit.Copies)))
	for i, d := range e.Later {
		if err := w.replayGovernance(d, r); err != nil {
			return refuse(kms.KindOf(err), err, "later decision %d: %v", i+1, err)
		}
	}
	if r.Receipts, err = w.kekReceipts(e, out); err != nil {
		return err
	}
	if missing := unproven(w.stillMembers(nodes), ring, r.Receipts); len(missing) > 0 {
		return refuse(kms.Conflict, nil, "KEK version %d is not proven: receipts of %s are missing by the rule %s", commit.Version, list(missing), ring.Receipts)
	}
	r.passed("Nodes %s proved with signed receipts, showing its key check value, that they can open it, which meets the rule %s.", list(r.Receipts), ring.Receipts)
	r.Notes = append(r.Notes, "That the key versions were rewrapped under it, and the KEK before it retired, is in the cluster's state and log and not in this file.")
	return nil
}

// kekReceipts verifies the receipts for the KEK version committed and returns who gave
// them.
func (w *replay) kekReceipts(e Evidence, out decided) (given []string, err error) {
	last := ""
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
		if c.Keyring != out.kek.Keyring || c.Key != "" || c.Version != out.kek.Version {
			return nil, refuse(kms.Invalid, nil, "the receipt of node %s is for another version", env.Origin)
		}
		if err := w.inOrder(what, out.execution, env); err != nil {
			return nil, err
		}
		sum := sha256.Sum256(c.KCV)
		if !slices.ContainsFunc(out.kek.Checks, func(x state.Check) bool {
			return x.Node == env.Origin && subtle.ConstantTimeCompare(sum[:], x.Hash) == 1
		}) {
			return nil, refuse(kms.Invalid, nil, "the receipt of node %s does not show the KEK version committed", env.Origin)
		}
		given = append(given, env.Origin)
	}
	return given, nil
}

// lateRoots returns the place in the log after the decisions that receipts rest on: those
// that are signed with a hardware root approved after the proposal was executed.
func lateRoots(s *state.State, p state.Proposal, receipts []state.Receipt, limit uint64) uint64 {
	for _, r := range receipts {
		for _, f := range s.FormerRoots(r.Node) {
			if since, _ := s.Proposal(f.Proposal); f.Until < r.Index && since.Executed > p.Executed {
				limit = max(limit, since.Executed+1)
			}
		}
	}
	return limit
}
