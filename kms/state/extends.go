package state

import (
	"bytes"
	"slices"

	"github.com/hashicorp/go-memdb"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
)

// Extends checks that s can be what became of old: that nothing which old knows is
// missing from s, or as it was before. A snapshot from which the latest statements
// are left out is consistent in itself, and would give back a revoked custodian or
// a suspended key; a node that has seen more does not take it. Errors:
// kms.Conflict, naming the first record that is missing or older.
func (s *State) Extends(old *State) error {
	switch {
	case s.cluster != old.cluster:
		return kms.Errorf(kms.Conflict, "the state is of cluster %s, not of %s", s.cluster, old.cluster)
	case s.index < old.index || s.log.size < old.log.size || s.clock < old.clock:
		return kms.Errorf(kms.Conflict, "the state at log index %d is older than the one at %d", s.index, old.index)
	case s.index == old.index && s.Hash() != old.Hash():
		return kms.Errorf(kms.Conflict, "there is another state at log index %d already", s.index)
	}
	now := s.db.Txn(false)
	for _, check := range []func(*memdb.Txn, *memdb.Txn) error{
		extended(tableStatus, statusID, func(was, is *NodeStatus) bool { return is.Time >= was.Time }),
		extended(tableCustodian, custodianID, func(was, is *approval.Custodian) bool { return revised(was, is, was.Revision, is.Revision) }),
		extended(tablePolicy, policyID, func(was, is *approval.Policy) bool { return revised(was, is, was.Revision, is.Revision) }),
		extended(tableKeyring, keyringID, func(was, is *Keyring) bool {
			same := *was
			same.KEK = is.KEK // it changes without the revision
			return is.KEK >= was.KEK && revised(&same, is, was.Revision, is.Revision)
		}),
		extended(tableKEK, kekID, s.extendsKEK),
		extended(tableKey, keyID, func(was, is *Key) bool {
			return is.Latest >= was.Latest && revised(was, is, was.Revision, is.Revision)
		}),
		extended(tableVersion, versionID, s.extendsVersion),
		extended(tableProposal, proposalID, (*Proposal).extendedBy),
		extended(tableNode, nodeID, func(was, is *Node) bool {
			return is.Root >= was.Root && revised(was, is, was.Revision, is.Revision)
		}, func(was *Node) bool { return s.Removed(was.ID) }),
		extended(tableRemoved, removalID, func(was, is *Removal) bool { return revised(was, is, 0, 0) }),
		extended(tableSite, siteChangeID, func(was, is *siteChange) bool { return revised(was, is, was.Revision, is.Revision) }),
		extended(tableMembership, membershipID, func(was, is *Membership) bool {
			return is.Index > was.Index || revised(was, is, was.Confirmed, is.Confirmed)
		}),
		extended(tableFormer, formerID, func(was, is *FormerRoot) bool { return revised(was, is, 0, 0) }),
		extended(tableSuspension, suspensionID, func(was, is *Suspension) bool { return revised(was, is, 0, 0) }),
		extended(tableRecovery, recoveryID, func(was, is *Recovery) bool { return revised(was, is, 0, 0) }),
		kept(tableSeed, seedID, func(r *Seed) bool {
			n, ok := s.Node(r.Node)
			return ok && n.Root == r.Root
		}),
		extended(tableRelease, releaseID, func(was, is *Release) bool { return is.extends(was) }),
		kept(tableNext, nextID, func(r *Replacement) bool {
			n, ok := s.Node(r.Node)
			return ok && n.Root < r.Root
		}),
		kept(tableRefused, refusedID, func(r *RefusedCopy) bool {
			n, _ := s.Node(r.Node)
			next, _ := s.Replacement(r.Node)
			return r.Root == n.Root || r.Root == next.Root
		}),
		kept(tableRewrap, rewrapID, s.wantsBatch),
		kept(tableRewrapRefused, rewrapRefusedID, func(x *RefusedRewrap) bool { return s.wantsRewraps(x.Keyring, x.KEK) }),
		extended(tableRecoveryKey, recoveryKeyID, func(was, is *RecoveryKey) bool { return revised(was, is, 0, 0) }),
		extended(tableWitness, witnessID, func(was, is *Witness) bool { return revised(was, is, 0, 0) }),
		extended(tableCheckpoint, checkpointID, func(was, is *Checkpoint) bool { return revised(was, is, was.latest(), is.latest()) }),
		extended(tableCosignature, cosignatureID, func(was, is *Cosignature) bool { return revised(was, is, was.Index, is.Index) }),
		kept(tableRecoveryCopy, recoveryCopyID, func(c *RecoveryCopy) bool {
			k, ok := s.reader().kek(c.Keyring, c.Version)
			key, _ := s.RecoveryFor(c.Keyring)
			return ok && !k.Retired() && key.Number == c.Number
		}),
		extended(tableUse, useID, func(was, is *use) bool { return is.Hour >= was.Hour && is.Until >= was.Until }, s.forgetsUse),
		kept(tableNonce, nonceID, func(n *nonce) bool { return n.Time >= s.clock-Window }),
		kept(tableOutcome, outcomeID, func(o *Outcome) bool { return o.Time >= s.clock-OutcomeRetention }),
	} {
		if err := check(old.db.Txn(false), now); err != nil {
			return err
		}
	}
	return nil
}

// extended returns the check of one table: every record is still there, and ok; or it
// is gone for a reason.
func extended[T any](table string, id func(*T) []byte, ok func(was, is *T) bool, gone ...func(was *T) bool) func(old, now *memdb.Txn) error {
	return func(old, now *memdb.Txn) error {
		return each(old, table, func(was *T) error {
			if slices.ContainsFunc(gone, func(f func(*T) bool) bool { return f(was) }) {
				return nil
			}
			if is, found := find[T](now, table, byID, id(was)); !found || !ok(was, &is) {
				return kms.Errorf(kms.Conflict, "the state is older than the one known here: record %q of table %s is missing, changed or as it was before", id(was), table)
			}
			return nil
		})
	}
}

// kept returns the check of a table whose records stay while they are wanted.
func kept[T any](table string, id func(*T) []byte, wanted func(*T) bool) func(old, now *memdb.Txn) error {
	return func(old, now *memdb.Txn) error {
		return each(old, table, func(was *T) error {
			if _, found := find[T](now, table, byID, id(was)); wanted(was) && !found {
				return kms.Errorf(kms.Conflict, "the state has forgotten a record of table %s before its time", table)
			}
			return nil
		})
	}
}

// revised reports whether a record has another revision than before or is the same.
func revised[T any](was, is *T, before, after uint64) bool {
	return after > before || after == before && bytes.Equal(canon.Marshal(was), canon.Marshal(is))
}

func (s *State) extendsKEK(was, is *KEK) bool {
	if was.Retired() != is.Retired() || was.Retired() {
		return is.Retired() && is.RetiredIndex >= was.RetiredIndex && receiptsKept(was.Receipts, is.Receipts)
	}
	return is.Activated >= was.Activated && s.copiesKept(Pending{Keyring: was.Keyring, Version: was.Version}, was.Copies, is.Copies) && receiptsKept(was.Receipts, is.Receipts)
}

func (s *State) extendsVersion(was, is *Version) bool {
	same := was.Index == is.Index && was.madeUnder() == is.madeUnder() && was.Generated == is.Generated
	rewrapped := is.KEK > was.KEK
	material := is.State.Gone() || rewrapped || is.KEK == was.KEK && bytes.Equal(was.Wrapped, is.Wrapped) && s.copiesKept(Pending{was.Keyring, was.Key, was.Version}, was.Copies, is.Copies)
	return same && material && becomes(was.State, is.State) && receiptsKept(was.Receipts, is.Receipts)
}

// copiesKept reports whether every copy of a version is still there that is for a
// root which its node has in s, or is to have next, and that this did not refuse.
func (s *State) copiesKept(p Pending, was, is []SealedCopy) bool {
	return !slices.ContainsFunc(was, func(c SealedCopy) bool {
		n, _ := s.Node(c.Node)
		next, _ := s.Replacement(c.Node)
		wanted := c.Root == n.Root || c.Root == next.Root
		return wanted && !s.reader().refusedCopy(p, c) && !slices.ContainsFunc(is, func(x SealedCopy) bool {
			return x.Node == c.Node && x.Root == c.Root && bytes.Equal(x.Sealed, c.Sealed)
		})
	})
}

// becomes reports whether a state leads to another, in any number of steps.
func becomes(from, to kms.State) bool {
	if from == to {
		return true
	}
	for _, next := range []kms.State{kms.Active, kms.Suspended, kms.Deactivated, kms.Compromised, kms.Destroyed, kms.DestroyedCompromised} {
		// From suspended back to active is the one way back there is, and no
		// version goes it: suspension is the key's.
		if from.CanBecome(next) && (from != kms.Suspended || next != kms.Active) && becomes(next, to) {
			return true
		}
	}
	return false
}

func receiptsKept(was, is []Receipt) bool {
	return !slices.ContainsFunc(was, func(r Receipt) bool {
		return !slices.ContainsFunc(is, func(x Receipt) bool { return x.Node == r.Node && x.Index == r.Index })
	})
}

// extendedBy: what is closed stays as it is, but for the erasure of its execution;
// of what is not, each custodian's vote stays or is followed by another.
func (p *Proposal) extendedBy(is *Proposal) bool {
	if !p.live() && (is.Progress != p.Progress || is.Executed != p.Executed || len(is.Votes) != len(p.Votes)) {
		return false
	}
	return p.Index == is.Index && !slices.ContainsFunc(p.Votes, func(v Vote) bool {
		return !slices.ContainsFunc(is.Votes, func(x Vote) bool {
			return x.Statement.Custodian == v.Statement.Custodian && (x.Index == v.Index || x.Index > v.Index && p.live())
		})
	})
}
