package state

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
)

// A recovery takes the cluster from a state that custodians have named, by its
// hash, to the first state of another epoch. It is no command, since it is there
// for when no cluster is left to take one: every node that takes part makes the
// same step from the same backup and the same approved statement. It takes the index
// after the state's in the log, and a leaf.

// TypeRecover is the type of a recovery's leaf in the cluster log. Its Command is
// SHA-256 of the approved statement; no envelope has this type.
const TypeRecover Type = 20

// MaxApproved is the longest approved statement in bytes.
const MaxApproved = approval.MaxApproved

// EventRecovered says that an epoch has begun.
const EventRecovered = "recovered"

// Recovery is the beginning of an epoch.
type Recovery struct {
	Epoch    uint64 `cbor:"epoch"`
	Index    uint64 `cbor:"index"`    // that it takes in the log
	Time     int64  `cbor:"time"`     // cluster clock: when the statement was written
	Approved []byte `cbor:"approved"` // approval.Approved: what custodians signed, with their signatures
}

func recoveryID(r *Recovery) []byte { return numberKey(r.Epoch) }

// ID identifies the recovery: approval.ApprovedID.
func (r Recovery) ID() string { return approval.ApprovedID(r.Approved) }

// Lineage returns the identity of the history that the recovery begins.
func (r Recovery) Lineage(cluster string) string {
	h := sha256.New()
	h.Write([]byte("conclave/lineage/v1\x00" + cluster + "\x00" + r.ID()))
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// Epoch returns the number of the history that the state is of: 0 for that which
// began with the genesis.
func (s *State) Epoch() uint64 { return s.epoch }

// Lineage identifies the history that the state is of, 32 hexadecimal digits: in
// epoch 0 it is the cluster's identifier. Commands and proposals name it, so that
// what was signed in a history that was given up is nothing in the one that
// replaced it.
func (s *State) Lineage() string {
	if s.epoch == 0 {
		return s.cluster
	}
	return s.lineage
}

// Recoveries returns the beginnings of epochs, the first one first.
func (s *State) Recoveries() []Recovery { return s.reader().recoveries() }

func (r reader) recoveries() []Recovery { return list[Recovery](r.x, tableRecovery, byID, []byte{}) }

// Recovered returns the recovery with which the state's epoch began.
func (s *State) Recovered() (Recovery, bool) {
	return find[Recovery](s.read(), tableRecovery, byID, numberKey(s.epoch))
}

// setLineage sets what follows from the records of recoveries.
func (s *State) setLineage() {
	s.epoch, s.lineage = 0, ""
	if l := s.reader().recoveries(); len(l) > 0 {
		last := l[len(l)-1]
		s.epoch, s.lineage = last.Epoch, last.Lineage(s.cluster)
	}
}

// lineageOf reports whether the state's history has gone through a lineage.
func (s *State) lineageOf(lineage string) bool {
	return lineage == s.cluster || slices.ContainsFunc(s.Recoveries(), func(r Recovery) bool { return r.Lineage(s.cluster) == lineage })
}

// RecoverParams returns what a recover statement has to say of this state.
func (s *State) RecoverParams(epoch uint64, voters []string) approval.RecoverParams {
	sum := s.Hash()
	return approval.RecoverParams{
		Cluster: s.cluster, State: sum[:], Index: s.index, LogSize: s.log.size, LogRoot: s.log.root(), Epoch: epoch, Voters: voters,
	}
}

// CheckRecovery verifies that custodians of this state have approved the recovery
// with the quorum of its governance policy, and at least two of two sites. It does
// not look at what they approved. The decision says what is missing where the error
// is kms.NeedsApproval. Other errors: those of approval.ParseApproved, kms.Denied and
// kms.BadSignature for a statement that does not verify.
func (s *State) CheckRecovery(approved []byte) (approval.Decision, error) {
	a, p, err := approval.ParseApproved(approved)
	if err != nil {
		return approval.Decision{}, err
	}
	return s.reader().checkRecovery(a, p)
}

func (r reader) checkRecovery(a approval.Approved, p approval.Proposal) (approval.Decision, error) {
	if p.Action != kms.ActionRecover {
		return approval.Decision{}, kms.Errorf(kms.Invalid, "the statement is to %s, not to recover", p.Action)
	}
	pol, ok := r.policy(kms.Governance)
	rule, has := pol.Rule(kms.ActionRecover)
	if !ok || !has || !rule.Quorum() {
		return approval.Decision{}, kms.Errorf(kms.Invalid, "the governance policy has no quorum for %q", kms.ActionRecover)
	}
	rule = approval.RecoverRule(rule)
	var ids []string
	for _, st := range a.Statements {
		c, ok := r.custodian(st.Custodian)
		if !ok {
			return approval.Decision{}, kms.Errorf(kms.Denied, "there is no custodian %s in this state", st.Custodian)
		}
		if err := st.Verify(c, a.Proposal); err != nil {
			return approval.Decision{}, err
		}
		ids = append(ids, c.ID)
	}
	d := rule.Decide(p.Proposer, r.custodian, ids)
	if !d.Met {
		return d, kms.Errorf(kms.NeedsApproval, "the recover statement still needs %s", strings.Join(d.Missing, ", "))
	}
	return d, nil
}

// Superseded verifies what a node of another epoch shows: that custodians of this
// state have approved that the cluster goes on in a later epoch, and returns its
// number. Errors: those of CheckRecovery, kms.Conflict if it is no later epoch of this
// cluster.
func (s *State) Superseded(approved []byte) (uint64, error) {
	if _, err := s.CheckRecovery(approved); err != nil {
		return 0, err
	}
	_, p, err := approval.ParseApproved(approved)
	if err != nil {
		return 0, err
	}
	params, err := p.RecoverParams()
	if err != nil {
		return 0, err
	}
	if params.Cluster != s.cluster || params.Epoch <= s.epoch {
		return 0, kms.Errorf(kms.Conflict, "the recover statement begins epoch %d of cluster %s; this is epoch %d of cluster %s", params.Epoch, params.Cluster, s.epoch, s.cluster)
	}
	return params.Epoch, nil
}

// CheckStatement checks that a recover statement, approved or not, is about this very
// state, made under its governance policy, and names nodes of it. Errors: kms.Invalid,
// kms.Conflict naming what differs.
func (s *State) CheckStatement(p approval.Proposal) error {
	params, err := s.checkPlace(p)
	if err != nil {
		return err
	}
	if sum := s.Hash(); !bytes.Equal(params.State, sum[:]) {
		return otherBackup("the hash of the state")
	}
	return s.reader().checkBeginning(p, params, s.clock)
}

func otherBackup(what string) error {
	return kms.Errorf(kms.Conflict, "the recover statement is about another backup: %s is not the one of this state", what)
}

// checkPlace checks that a recover statement names this cluster and this place in its log.
func (s *State) checkPlace(p approval.Proposal) (params approval.RecoverParams, err error) {
	if params, err = p.RecoverParams(); err != nil {
		return params, err
	}
	switch {
	case params.Cluster != s.cluster:
		err = otherBackup("the cluster")
	case p.Cluster != s.Lineage() || p.Revision != s.epoch:
		err = otherBackup("the epoch")
	case params.Index != s.index || params.LogSize != s.log.size || !bytes.Equal(params.LogRoot, s.log.root()):
		err = otherBackup("the place in the log")
	}
	return params, err
}

// checkBeginning checks what does not take the hash of the state.
func (r reader) checkBeginning(p approval.Proposal, params approval.RecoverParams, clock int64) error {
	pol, _ := r.policy(kms.Governance)
	rule, ok := pol.Rule(kms.ActionRecover)
	switch {
	case p.Policy != kms.Governance || p.PolicyRevision != pol.Revision || !ok:
		return kms.Errorf(kms.Conflict, "the recover statement is made under policy %s at revision %d; it takes policy %s at revision %d", p.Policy, p.PolicyRevision, kms.Governance, pol.Revision)
	case p.Created < clock:
		return kms.Errorf(kms.Conflict, "the recover statement was written before the time of the backup; check the clocks")
	case p.Expires > p.Created+rule.Lifetime:
		return kms.Errorf(kms.Invalid, "the recover statement expires later than the policy's lifetime of %d ms allows", rule.Lifetime)
	case p.NotBefore < p.Created+rule.Delay && rule.Delay > 0:
		return kms.Errorf(kms.Invalid, "the recover statement may be carried out before the policy's delay of %d ms is over", rule.Delay)
	}
	if _, err := r.identity(p.Proposer); err != nil {
		return err
	}
	for _, id := range params.Voters {
		n, ok := r.node(id)
		if !ok {
			return kms.Errorf(kms.Conflict, "the recover statement names %s as a voter, which is no node of this state", id)
		}
		if n.Root == 0 {
			return kms.Errorf(kms.Conflict, "the recover statement names %s as a voter, which has no hardware root yet", id)
		}
	}
	return nil
}

// Recover returns the first state of the epoch that custodians approved to begin
// with this state. Errors: those of CheckStatement and CheckRecovery.
func (s *State) Recover(approved []byte) (*State, error) {
	_, p, err := approval.ParseApproved(approved)
	if err != nil {
		return nil, err
	}
	if p.Action != kms.ActionRecover {
		return nil, kms.Errorf(kms.Invalid, "the statement is to %s, not to recover", p.Action)
	}
	if _, err := s.checkPlace(p); err != nil {
		return nil, err
	}
	if _, err := s.CheckRecovery(approved); err != nil { // before all of the state is hashed
		return nil, err
	}
	if err := s.CheckStatement(p); err != nil {
		return nil, err
	}
	t := s.begin(s.index+1, Envelope{}, slices.Clone(approved))
	t.clock = p.Created
	if err := run(t, recovery{}); err != nil {
		t.Abort()
		return nil, err
	}
	next := t.done()
	next.view = next.db.Txn(false)
	next.log = s.log.add(RecoveryLeaf(t.index, p.Created, approved))
	return next, nil
}

// RecoveryLeaf returns a recovery's leaf in the cluster log, see Leaf.
func RecoveryLeaf(index uint64, created int64, approved []byte) []byte {
	sum := sha256.Sum256(approved)
	return canon.Marshal(Leaf{Index: index, Time: created, Type: TypeRecover, Command: sum[:]})
}

// recovery is the step as an operation; tx.raw is the approved statement.
type recovery struct{}

func (recovery) Type() Type              { return TypeRecover }
func (recovery) validate(Envelope) error { return nil }

func (recovery) verify(t *tx) error {
	a, p, err := approval.ParseApproved(t.raw)
	if err != nil {
		return err
	}
	_, err = t.reader().checkRecovery(a, p)
	return err
}

// apply begins the epoch: its voters vote and no others, and nothing that was proposed
// before can be carried out. An approval that was withdrawn after the backup could
// else be given again by whoever has kept it.
func (recovery) apply(t *tx) error {
	_, p, err := approval.ParseApproved(t.raw)
	if err != nil {
		return err
	}
	params, err := p.RecoverParams()
	if err != nil {
		return err
	}
	r := t.reader()
	if err := r.checkBeginning(p, params, t.before.clock); err != nil {
		return err
	}
	if params.Index+1 != t.index || p.Created != t.clock || p.Cluster != t.before.Lineage() || p.Revision != t.before.epoch || params.Cluster != t.before.cluster {
		return kms.Errorf(kms.Conflict, "the recover statement is about another place in the log, time or history")
	}
	for _, o := range r.live() {
		t.void(o)
	}
	for _, n := range r.nodes() {
		if votes := slices.Contains(params.Voters, n.ID); votes != n.Voter {
			n.Voter = votes
			n.Revision++
			insert(t.Txn, tableNode, n)
		}
	}
	if m, ok := r.membership(); ok { // Raft begins with the list of this state
		mustDB(t.Delete(tableMembership, &m))
	}
	x := Recovery{Epoch: params.Epoch, Index: t.index, Time: t.clock, Approved: t.raw}
	insert(t.Txn, tableRecovery, x)
	t.recovered = &x
	t.event(Event{Type: EventRecovered})
	return nil
}
