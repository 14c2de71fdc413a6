package state

import (
	"crypto/sha256"
	"encoding/binary"
	"hash"
	"io"
	"slices"

	"github.com/hashicorp/go-memdb"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/canon"
)

// A snapshot is a stream of records. Each is a table number (1 byte), a length (4
// bytes, big endian) and as many bytes of canonical CBOR; they stand in the order
// of the table numbers and, in a table, of the identifiers. The header comes first.
// The end record, number 255, carries SHA-256 over all bytes before it.
const (
	recordHeader uint8 = 0
	recordEnd    uint8 = 255

	snapshotFormat uint8 = 4 // the newest that this program reads and writes
	baseFormat     uint8 = 4 // the oldest; every release that takes part in a cluster reads it
)

// snapshotTable is a table in a snapshot.
type snapshotTable struct {
	number   uint8 // of its records
	verified bool  // its records follow from signed statements
	name     string
	write    func(x *memdb.Txn, f func([]byte) error) error
	insert   func(x *memdb.Txn, b []byte) error
}

// snapshotTables are the tables of a snapshot, by number. Numbers are append only and
// an empty table writes nothing: so a release with one more table has the same hash as
// the one before it, until the table is used.
var snapshotTables = []snapshotTable{
	stated[NodeStatus](1, tableStatus, statusID),
	stated[approval.Custodian](2, tableCustodian, custodianID),
	stated[approval.Policy](3, tablePolicy, policyID),
	stated[Keyring](4, tableKeyring, keyringID),
	stated[KEK](5, tableKEK, kekID),
	stated[Key](6, tableKey, keyID),
	stated[Version](7, tableVersion, versionID),
	stated[Proposal](8, tableProposal, proposalID),
	stated[Node](9, tableNode, nodeID),
	stated[Replacement](10, tableNext, nextID),
	stated[FormerRoot](11, tableFormer, formerID),
	stated[resealed](12, tableResealed, resealedID),
	stated[RefusedCopy](13, tableRefused, refusedID),
	remembered[nonce](14, tableNonce, nonceID),
	remembered[Outcome](15, tableOutcome, outcomeID),
	stated[Release](16, tableRelease, releaseID),
	stated[Membership](17, tableMembership, membershipID),
	stated[Removal](18, tableRemoved, removalID),
	stated[siteChange](19, tableSite, siteChangeID),
	stated[Recovery](20, tableRecovery, recoveryID),
	stated[Seed](21, tableSeed, seedID),
	stated[RewrapBatch](30, tableRewrap, rewrapID),
	stated[RefusedRewrap](31, tableRewrapRefused, rewrapRefusedID),
	stated[RecoveryKey](40, tableRecoveryKey, recoveryKeyID),
	stated[RecoveryCopy](41, tableRecoveryCopy, recoveryCopyID),
	remembered[use](50, tableUse, useID),
	stated[Witness](53, tableWitness, witnessID),
	stated[Checkpoint](54, tableCheckpoint, checkpointID),
	stated[Cosignature](55, tableCosignature, cosignatureID),
	stated[Suspension](57, tableSuspension, suspensionID),
}

// stated is a table whose records follow from signed statements, remembered is another.
func stated[T any](number uint8, table string, id func(*T) []byte) snapshotTable {
	return snapshotTable{number, true, table, writeTable[T](table), insertInto(table, id)}
}

func remembered[T any](number uint8, table string, id func(*T) []byte) snapshotTable {
	return snapshotTable{number, false, table, writeTable[T](table), insertInto(table, id)}
}

// tableOf returns the table of a record number.
func tableOf(number uint8) (snapshotTable, bool) {
	return search(snapshotTables, func(t snapshotTable) bool { return t.number == number })
}

// verifiedTables are those of snapshotTables that follow from signed statements.
func verifiedTables() []snapshotTable {
	return slices.DeleteFunc(slices.Clone(snapshotTables), func(t snapshotTable) bool { return !t.verified })
}

func writeTable[T any](table string) func(*memdb.Txn, func([]byte) error) error {
	return func(x *memdb.Txn, f func([]byte) error) error {
		return each(x, table, func(r *T) error { return f(canon.Marshal(r)) })
	}
}

func insertInto[T any](table string, id func(*T) []byte) func(*memdb.Txn, []byte) error {
	return func(x *memdb.Txn, b []byte) error {
		r := new(T)
		if err := canon.Unmarshal(b, r); err != nil {
			return kms.Wrap(kms.Invalid, err, "snapshot: a record of table "+table+" is not in canonical form", "")
		}
		if len(id(r)) == 0 {
			return kms.Errorf(kms.Invalid, "snapshot: a record of table %s has no identifier", table)
		}
		if k, ok := any(r).(*Key); ok && len(k.ID) != KeyIDSize {
			return kms.Errorf(kms.Invalid, "snapshot: key %s has no key id", kms.KeyPath(k.Keyring, k.Name))
		}
		if err := x.Insert(table, r); err != nil {
			return kms.Wrap(kms.Invalid, err, "snapshot: a record of table "+table+" cannot be stored", "")
		}
		return nil
	}
}

// header is the first record of a snapshot.
type header struct {
	Format    uint8         `cbor:"format"`
	Cluster   string        `cbor:"cluster"`
	Index     uint64        `cbor:"index"`
	Clock     int64         `cbor:"clock"`
	LogSize   uint64        `cbor:"log-size"`
	LogHashes [][]byte      `cbor:"log-hashes"` // compact range of the cluster log
	Genesis   SignedGenesis `cbor:"genesis"`
}

func (s *State) header() header {
	return header{s.format(), s.cluster, s.index, s.clock, s.log.size, s.log.hashes, s.signed}
}

// Hash identifies the state: SHA-256 over the records of its snapshot, as in the
// end record. It takes time in proportion to the state.
func (s *State) Hash() [32]byte {
	h := sha256.New()
	_ = s.records(h) // a hash never fails
	return [32]byte(h.Sum(nil))
}

// Snapshot writes the state to w, to be read by Restore. Errors are w's.
func (s *State) Snapshot(w io.Writer) error {
	_, err := s.SnapshotHash(w)
	return err
}

// SnapshotHash is Snapshot that returns the state's hash too.
func (s *State) SnapshotHash(w io.Writer) ([32]byte, error) {
	h := sha256.New()
	if err := s.records(io.MultiWriter(w, h)); err != nil {
		return [32]byte{}, err
	}
	sum := [32]byte(h.Sum(nil))
	return sum, writeRecord(w, recordEnd, sum[:])
}

func (s *State) records(w io.Writer) error {
	if err := writeRecord(w, recordHeader, canon.Marshal(s.header())); err != nil {
		return err
	}
	return s.writeTables(w, snapshotTables)
}

// writeTables writes the records of some tables.
func (s *State) writeTables(w io.Writer, tables []snapshotTable) error {
	x := s.db.Txn(false)
	for _, t := range tables {
		if err := t.write(x, func(b []byte) error { return writeRecord(w, t.number, b) }); err != nil {
			return err
		}
	}
	return nil
}

func writeRecord(w io.Writer, number uint8, b []byte) error {
	frame := binary.BigEndian.AppendUint32([]byte{number}, uint32(len(b)))
	if _, err := w.Write(frame); err != nil {
		return err
	}
	_, err := w.Write(b)
	return err
}

// recordReader reads records and hashes what it reads.
type recordReader struct {
	r    io.Reader
	hash hash.Hash
	last uint8 // number of the record before
}

// next returns the next record. It allocates no more than arrives.
func (r *recordReader) next() (uint8, []byte, error) {
	damaged := func(err error) error {
		return kms.Wrap(kms.Invalid, err, "snapshot: it ends early or is damaged", "take another copy")
	}
	var frame [5]byte
	if _, err := io.ReadFull(r.r, frame[:]); err != nil {
		return 0, nil, damaged(err)
	}
	number, size := frame[0], binary.BigEndian.Uint32(frame[1:])
	if size > MaxRecord {
		return 0, nil, kms.Errorf(kms.TooLarge, "snapshot: a record of %d bytes exceeds the limit of %d", size, MaxRecord)
	}
	b, err := io.ReadAll(io.LimitReader(r.r, int64(size)))
	if err != nil {
		return 0, nil, damaged(err)
	}
	if len(b) != int(size) {
		return 0, nil, damaged(io.ErrUnexpectedEOF)
	}
	if number < r.last {
		return 0, nil, kms.Errorf(kms.Invalid, "snapshot: its records are not in order")
	}
	if number != recordEnd {
		r.hash.Write(frame[:])
		r.hash.Write(b)
	}
	r.last = number
	return number, b, nil
}
