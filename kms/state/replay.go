package state

import (
	"cmp"
	"slices"
	"strings"

	"github.com/conclave-kms/conclave/kms"
)

// statement is a stored statement with where and when it was applied. The index
// and the clock are the snapshot's word; that they are in order and fit the signed
// times is checked.
type statement struct {
	index uint64
	clock int64
	raw   []byte // signed command, or
	op    operation
	env   *Envelope // of op, what is known of it
	hash  []byte    // of op, the claimed hash of the command
}

// replay applies a statement as Apply would at its time, without the bookkeeping
// of nonces and outcomes.
func (s *State) replay(st statement, o *opened) (*State, error) {
	var e Envelope
	op := st.op
	switch {
	case op == nil:
		var err error
		if e, op, err = s.openStatement(o); err != nil {
			return nil, err
		}
		if e.Time < st.clock-Window {
			return nil, kms.Errorf(kms.Expired, "it was signed more than 10 minutes before it was applied")
		}
	case st.env != nil:
		e = *st.env
	}
	if v, ok := op.(CastVote); ok {
		if err := v.validate(e); err != nil {
			return nil, err
		}
	}
	t := s.begin(st.index, e, st.raw)
	t.clock, t.claimed, t.replay = st.clock, st.hash, true
	if err := run(t, op); err != nil {
		t.Abort()
		return nil, err
	}
	return t.done(), nil
}

// openStatement verifies a stored command that was opened ahead.
func (s *State) openStatement(o *opened) (Envelope, operation, error) {
	if o.broken != nil {
		return o.env, nil, o.broken
	}
	if err := s.inLineage(o.env); err != nil {
		return o.env, nil, err
	}
	suite, signing, err := s.signer(o.env)
	if err != nil {
		return o.env, nil, err
	}
	if !o.by(suite, signing) {
		if err := wrongSignature(o.env, verifyBy(suite, signing, o.envelope, CommandContext, o.signature)); err != nil {
			return o.env, nil, err
		}
	}
	return o.env, o.op, o.unfit
}

// openTick opens and verifies a node's last tick, which may be from the time of
// one of its former roots, or of a node that was removed: a tick tells where the clock
// stood, and no root that signed one can move it by itself.
func (s *State) openTick(raw []byte) (Envelope, operation, error) {
	o := open(raw)
	e := o.env
	if o.broken != nil {
		return e, nil, o.broken
	}
	if !s.lineageOf(e.Cluster) {
		return e, nil, kms.Errorf(kms.Invalid, "the command is for another cluster")
	}
	err := s.verifySignature(e, o.envelope, o.signature, nil)
	roots := s.FormerRoots(e.Origin)
	if old, removed := s.Removal(e.Origin); removed {
		roots = append(roots, FormerRoot{SigningSuite: old.Node.SigningSuite, Signing: old.Node.Signing})
		err = kms.Errorf(kms.BadSignature, "the tick of node %s is signed by no root that it had", e.Origin)
	}
	for _, f := range roots {
		if kms.KindOf(err) != kms.BadSignature {
			break
		}
		if verifyBy(f.SigningSuite, f.Signing, o.envelope, CommandContext, o.signature) == nil {
			err = nil
		}
	}
	if err != nil {
		return e, nil, err
	}
	return e, o.op, o.unfit
}

// verifyTicks checks the ticks behind the clock.
func (s *State) verifyTicks() error {
	r := s.reader()
	status := list[NodeStatus](r.x, tableStatus, byID, []byte{})
	nodes := r.nodes()
	for _, old := range r.removals() {
		nodes = append(nodes, old.Node)
	}
	slices.SortFunc(nodes, func(a, b Node) int { return strings.Compare(a.ID, b.ID) })
	if err := exactly("status", nodes, func(i int) string { return status[i].Node }, len(status)); err != nil {
		return err
	}
	for _, st := range status {
		if len(st.Statement) == 0 {
			if st.Time != s.genesis.Created {
				return kms.Errorf(kms.Invalid, "snapshot: node %s has a time, but no tick", st.Node)
			}
			continue
		}
		e, op, err := s.openTick(st.Statement)
		if err != nil {
			return err
		}
		if _, ok := op.(Tick); !ok || e.Origin != st.Node || e.Time != st.Time || e.Time <= s.genesis.Created {
			return kms.Errorf(kms.Invalid, "snapshot: the tick of node %s is not what its status says", st.Node)
		}
	}
	return nil
}

// verifyClock checks that the clock is where the ticks put it. fewest is the smallest
// number of sites that ever counted. The clock cannot be behind the median of those that
// count now. While no node comes or goes that is where it is; else it may stand where other
// sites had put it, but no further than a majority of the fewest has signed: the last ticks
// of removed nodes are kept for that.
func (s *State) verifyClock(fewest int) error {
	r := s.reader()
	began, _ := s.Recovered()
	latest := r.latest()
	for _, old := range r.removals() {
		st, _ := s.NodeStatus(old.Node.ID)
		latest[old.Node.Site] = max(latest[old.Node.Site], st.Time)
	}
	signed := 0
	for _, time := range latest {
		if time >= s.clock {
			signed++
		}
	}
	if s.clock < max(r.median(), s.genesis.Created, began.Time) || s.clock > max(s.genesis.Created, began.Time) && signed < fewest/2+1 {
		return kms.Errorf(kms.Invalid, "snapshot: the clock is not the median of the nodes' times")
	}
	return nil
}

// statements collects every stored statement in the order of the log.
func (s *State) statements() ([]statement, error) {
	x := s.db.Txn(false)
	var log []statement
	add := func(index uint64, clock int64, raw []byte) {
		log = append(log, statement{index: index, clock: clock, raw: raw})
	}
	_ = each(x, tableKeyring, func(k *Keyring) error { add(k.Index, k.Created, k.Statement); return nil })
	receipts := func(l []Receipt) {
		for _, r := range l {
			add(r.Index, r.Time, r.Statement)
		}
	}
	_ = each(x, tableKEK, func(k *KEK) error {
		receipts(k.Receipts)
		if k.Retired() {
			add(k.RetiredIndex, k.RetiredAt, k.Retirement)
		}
		return nil
	})
	_ = each(x, tableRewrap, func(b *RewrapBatch) error {
		log = append(log, b.statement(s.reader()))
		for _, c := range b.Confirmed {
			add(c.Index, c.Time, c.Statement)
		}
		return nil
	})
	_ = each(x, tableRewrapRefused, func(r *RefusedRewrap) error { add(r.Index, r.Time, r.Statement); return nil })
	err := each(x, tableVersion, func(v *Version) error {
		receipts(v.Receipts)
		st, err := s.origin(v)
		log = append(log, st)
		return err
	})
	if err != nil {
		return nil, err
	}
	_ = each(x, tableResealed, func(r *resealed) error { add(r.Index, r.Time, r.Statement); return nil })
	_ = each(x, tableMembership, func(m *Membership) error {
		if m.Confirmed != 0 {
			add(m.Confirmed, m.Time, m.Statement)
		}
		return nil
	})
	_ = each(x, tableRecoveryCopy, func(c *RecoveryCopy) error { add(c.Index, c.Time, c.Statement); return nil })
	_ = each(x, tableRecovery, func(r *Recovery) error {
		log = append(log, statement{index: r.Index, clock: r.Time, raw: r.Approved, op: recovery{}})
		return nil
	})
	_ = each(x, tableSuspension, func(r *Suspension) error { add(r.Index, r.Time, r.Statement); return nil })
	_ = each(x, tableSeed, func(r *Seed) error { add(r.Index, r.Time, r.Statement); return nil })
	_ = each(x, tableWitness, func(r *Witness) error { add(r.Index, r.Time, r.Statement); return nil })
	_ = each(x, tableCheckpoint, func(r *Checkpoint) error {
		add(r.Index, r.Time, r.Statement)
		if r.Fork != nil {
			add(r.Fork.Index, r.Fork.Time, r.Fork.Statement)
		}
		return nil
	})
	_ = each(x, tableCosignature, func(r *Cosignature) error { add(r.Index, r.Time, r.Statement); return nil })
	_ = each(x, tableRelease, func(r *Release) error { add(r.Index, r.Time, r.Statement); return nil })
	_ = each(x, tableRefused, func(r *RefusedCopy) error { add(r.Index, r.Time, r.Statement); return nil })
	_ = each(x, tableFormer, func(f *FormerRoot) error { add(f.Until, f.Time, f.Statement); return nil })
	_ = each(x, tableProposal, func(p *Proposal) error {
		add(p.Index, p.Opened, p.Statement)
		for _, v := range p.Votes {
			log = append(log, statement{index: v.Index, clock: v.Time, op: CastVote{v.Statement}})
		}
		if p.Executed != 0 && !p.bringsVersion() {
			add(p.Executed, p.ClosedAt, p.Execution)
		}
		return nil
	})
	slices.SortFunc(log, func(a, b statement) int { return cmp.Compare(a.index, b.index) })
	return log, nil
}

// origin returns the statement that brought a version. Of a destroyed version the
// command is gone with the material; what is known of it stands in for it, and the
// proposal that destroyed the version, with its votes, must be there.
func (s *State) origin(v *Version) (statement, error) {
	st := statement{index: v.Index, clock: v.Created, raw: v.Statement}
	if len(v.Statement) > 0 {
		return st, nil
	}
	if !v.State.Gone() || len(v.Erased) != HashSize {
		return st, kms.Errorf(kms.Invalid, "snapshot: version %d of key %s has no statement", v.Version, kms.KeyPath(v.Keyring, v.Key))
	}
	r := s.reader()
	st.hash = v.Erased
	if v.Version == 1 {
		k, ok := r.key(v.Keyring, v.Key)
		if !ok {
			return st, kms.Errorf(kms.Invalid, "snapshot: a version of key %s, which does not exist", kms.KeyPath(v.Keyring, v.Key))
		}
		st.env = &Envelope{Origin: v.Origin, Principal: k.Creator}
		made := CreateKey{
			Keyring: v.Keyring, Name: v.Key, ID: k.ID, Purpose: k.Purpose, Algorithm: k.Algorithm,
			RotationPeriod: k.RotationPeriod, KEK: v.KEK, Generated: v.Generated, PublicKey: v.PublicKey, Checks: v.Checks,
		}
		if v.Proposal != "" {
			st.env.Principal = ""
			if p, ok := r.proposal(v.Proposal); ok { // the key's period may be another one since
				params, err := p.Content.ImportParams()
				if err != nil {
					return st, err
				}
				made.RotationPeriod = params.RotationPeriod
			}
			st.op = ImportKey{Proposal: v.Proposal, Key: made}
			return st, st.op.(ImportKey).validateErased()
		}
		st.op = made
		return st, made.validateErased()
	}
	p, ok := r.proposal(v.Proposal)
	if !ok {
		return st, kms.Errorf(kms.Invalid, "snapshot: version %d of key %s has no proposal", v.Version, kms.KeyPath(v.Keyring, v.Key))
	}
	st.env = &Envelope{Origin: v.Origin, Expect: p.Content.Revision}
	st.op = CommitRotation{
		Proposal: v.Proposal, Keyring: v.Keyring, Key: v.Key, Version: v.Version, KEK: v.KEK,
		Generated: v.Generated, PublicKey: v.PublicKey, Checks: v.Checks,
	}
	return st, st.op.(CommitRotation).validateErased()
}
