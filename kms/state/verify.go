package state

import (
	"crypto/sha256"

	"github.com/conclave-kms/conclave/kms"
)

// verification is what it takes to verify a state that was read: its statements, and
// hashes of the records that must follow from them. It does not hold the records
// themselves, so that they and those of the replay need not be in memory together.
type verification struct {
	state      State // without its records
	log        []statement
	signers    signers
	sums       map[uint8][sha256.Size]byte // of the tables that follow from statements
	status     []any                       // verified by themselves
	remembered map[string][]any            // records of the other tables
}

// toVerify checks what needs no replay, and takes the rest out of the state.
func (s *State) toVerify() (*verification, error) {
	if err := s.verifyTicks(); err != nil {
		return nil, err
	}
	log, err := s.statements()
	if err != nil {
		return nil, err
	}
	v := &verification{state: *s, log: log, signers: s.signers(), sums: s.sums(), status: s.rawRecords(tableStatus), remembered: map[string][]any{}}
	v.state.db, v.state.view = nil, nil
	for _, t := range snapshotTables {
		if !t.verified {
			v.remembered[t.name] = s.rawRecords(t.name)
		}
	}
	return v, nil
}

// run plays the statements and returns the state that they give.
func (v *verification) run(spread Spread) (*State, error) {
	replay, fewest, err := v.replay(spread)
	if err != nil {
		return nil, err
	}
	s := v.state
	s.db = replay.db
	s.put(tableStatus, v.status)
	sums := s.sums()
	for _, t := range verifiedTables() {
		if sums[t.number] != v.sums[t.number] {
			return nil, kms.Errorf(kms.Invalid, "snapshot: the records of table %s are not what the signed statements give", t.name)
		}
	}
	for _, t := range snapshotTables {
		if !t.verified {
			s.put(t.name, v.remembered[t.name])
		}
	}
	if err := s.verifyClock(fewest); err != nil {
		return nil, err
	}
	return &s, s.wholeWraps()
}

// replay returns the state that the statements give, and the smallest number of sites
// that ever counted for the clock.
func (v *verification) replay(spread Spread) (*State, int, error) {
	replay := founded(v.state.signed, v.state.genesis)
	fewest := len(replay.reader().latest())
	var ahead []opened
	for i, st := range v.log {
		if i%aheadOf == 0 {
			ahead = v.signers.open(ahead, v.log[i:min(i+aheadOf, len(v.log))], spread)
		}
		if i > 0 && v.log[i-1].index >= st.index || st.index == 0 || st.index > v.state.index {
			return nil, 0, kms.Errorf(kms.Invalid, "snapshot: two statements claim log index %d, or it is out of range", st.index)
		}
		if st.clock < replay.clock || st.clock > v.state.clock {
			return nil, 0, kms.Errorf(kms.Invalid, "snapshot: the time at log index %d is out of order", st.index)
		}
		next, err := replay.replay(st, &ahead[i%aheadOf])
		if err != nil {
			return nil, 0, kms.Wrap(kms.KindOf(err), err, "snapshot: the statement at log index "+decimal(st.index)+" does not hold: "+message(err), "restore from a trusted node")
		}
		replay = next
		fewest = min(fewest, len(replay.reader().latest()))
	}
	return replay, fewest, nil
}

// sums hashes the records of each table that follows from statements.
func (s *State) sums() map[uint8][sha256.Size]byte {
	sums := map[uint8][sha256.Size]byte{}
	x := s.db.Txn(false)
	for _, t := range verifiedTables() {
		h := sha256.New()
		_ = t.write(x, func(b []byte) error { return writeRecord(h, t.number, b) }) // a hash never fails
		sums[t.number] = [sha256.Size]byte(h.Sum(nil))
	}
	return sums
}

// rawRecords returns the records of a table as the database holds them.
func (s *State) rawRecords(table string) (l []any) {
	it, err := s.db.Txn(false).Get(table, byID+"_prefix", []byte{})
	mustDB(err)
	for raw := it.Next(); raw != nil; raw = it.Next() {
		l = append(l, raw)
	}
	return l
}

// put replaces records of a table of a state that is in the making.
func (s *State) put(table string, records []any) {
	x := s.db.Txn(true)
	for _, raw := range records {
		mustDB(x.Insert(table, raw))
	}
	x.Commit()
}
