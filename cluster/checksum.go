package cluster

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms"
)

// bbolt checks the pages that describe the file and no others, and Raft checks nothing:
// a byte that changes on the disk would be a log entry without effect, a vote that was
// never given or a term long past. checkedStore keeps a checksum with each entry and
// each value and refuses what does not fit.
type checkedStore struct {
	LogStore
	path string
	mu   sync.Mutex // one value and its checksum at a time
}

// A checksum is the first 16 bytes of a SHA-256. In a log entry it stands in
// raft.Log.Extensions behind a byte that says so; Raft hands that field on untouched.
const (
	checksumSize = 16
	checksumMark = 0xc1
)

// checksumKey begins the keys of the checksums of values: 16 bytes each for the value
// that is being replaced and the one that replaces it.
const checksumKey = "checksum/"

func entryChecksum(l *raft.Log) []byte {
	h := sha256.New()
	var head [17]byte
	binary.BigEndian.PutUint64(head[:], l.Index)
	binary.BigEndian.PutUint64(head[8:], l.Term)
	head[16] = byte(l.Type)
	h.Write(head[:])
	h.Write(l.Data)
	return h.Sum(nil)[:checksumSize]
}

func valueChecksum(key, value []byte) []byte {
	h := sha256.New()
	fmt.Fprintf(h, "%d %s ", len(key), key)
	h.Write(value)
	return h.Sum(nil)[:checksumSize]
}

func (s *checkedStore) damaged(what string, args ...any) error {
	return &kms.Error{Kind: kms.Unavailable, Msg: "the log " + s.path + " is damaged: " + fmt.Sprintf(what, args...), Fix: storeFix}
}

// check refuses an entry that does not fit its checksum. One that an older release has
// written has none.
func (s *checkedStore) check(index uint64, l *raft.Log) error {
	if l.Index != index {
		return s.damaged("where entry %d should be there is entry %d", index, l.Index)
	}
	if len(l.Extensions) != 1+checksumSize || l.Extensions[0] != checksumMark {
		return nil
	}
	if !bytes.Equal(l.Extensions[1:], entryChecksum(l)) {
		return s.damaged("entry %d is not what was written", index)
	}
	return nil
}

// GetLog implements raft.LogStore.
func (s *checkedStore) GetLog(index uint64, l *raft.Log) error {
	if err := s.LogStore.GetLog(index, l); err != nil {
		return err
	}
	return s.check(index, l)
}

// StoreLog implements raft.LogStore.
func (s *checkedStore) StoreLog(l *raft.Log) error { return s.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore.
func (s *checkedStore) StoreLogs(logs []*raft.Log) error {
	with := make([]*raft.Log, len(logs))
	for i, l := range logs {
		c := *l // Raft is still using l
		if len(c.Extensions) == 0 {
			c.Extensions = append([]byte{checksumMark}, entryChecksum(l)...)
		} else if err := s.check(l.Index, l); err != nil {
			return err
		}
		with[i] = &c
	}
	return s.LogStore.StoreLogs(with)
}

// checkAll reads the whole log and the values.
func (s *checkedStore) checkAll() error {
	first, err := s.FirstIndex()
	if err != nil {
		return storeError(s.path, err)
	}
	last, err := s.LastIndex()
	if err != nil {
		return storeError(s.path, err)
	}
	if first > last || last-first > 1<<32 {
		return s.damaged("it has entries %d and %d", first, last)
	}
	for i := first; i <= last && last > 0; i++ {
		if err := s.GetLog(i, new(raft.Log)); err != nil {
			if _, ours := err.(*kms.Error); ours {
				return err
			}
			return s.damaged("entry %d of %d to %d cannot be read: %v", i, first, last, err)
		}
	}
	for _, key := range []string{keyTerm, keyVoteTerm, keyVote} {
		if _, err := s.Get([]byte(key)); err != nil && !missing(err) {
			return err
		}
	}
	return nil
}

// The values that Raft keeps.
const (
	keyTerm     = "CurrentTerm"
	keyVoteTerm = "LastVoteTerm"
	keyVote     = "LastVoteCand"
)

// Set implements raft.StableStore. Raft sets its term from two goroutines, that of its state and the one
// that heartbeats come in by, and a term never goes back. The checksum goes first, beside that of the value
// there: whenever it is cut short, the value fits one of them. The first value of a key goes
// before its checksum, so that a missing value is never what was written.
func (s *checkedStore) Set(key, value []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	old, err := s.Get(key)
	if err == nil && string(key) == keyTerm && bytes.Compare(value, old) <= 0 { // of eight bytes each
		return nil
	}
	sums := append(valueChecksum(key, old), valueChecksum(key, value)...)
	switch {
	case missing(err):
		if err := s.LogStore.Set(key, value); err != nil {
			return err
		}
		copy(sums, sums[checksumSize:])
		return s.LogStore.Set(checksumOf(key), sums)
	case err != nil:
		return err
	}
	if err := s.LogStore.Set(checksumOf(key), sums); err != nil {
		return err
	}
	return s.LogStore.Set(key, value)
}

// SetUint64 implements raft.StableStore.
func (s *checkedStore) SetUint64(key []byte, value uint64) error {
	return s.Set(key, binary.BigEndian.AppendUint64(nil, value))
}

func checksumOf(key []byte) []byte { return append([]byte(checksumKey), key...) }

// Get implements raft.StableStore.
func (s *checkedStore) Get(key []byte) ([]byte, error) {
	value, err := s.LogStore.Get(key)
	if err != nil && !missing(err) {
		return nil, err
	}
	if wrong := s.checkValue(key, value); wrong != nil {
		return nil, wrong
	}
	return value, err
}

// GetUint64 implements raft.StableStore.
func (s *checkedStore) GetUint64(key []byte) (uint64, error) {
	value, err := s.Get(key)
	if err != nil {
		return 0, err
	}
	if len(value) != 8 {
		return 0, s.damaged("%s has %d bytes", key, len(value))
	}
	return binary.BigEndian.Uint64(value), nil
}

// checkValue refuses a value that is none of the two last written. Of what an older
// release has written nothing is known.
func (s *checkedStore) checkValue(key, value []byte) error {
	sums, err := s.LogStore.Get(checksumOf(key))
	if missing(err) {
		return nil
	}
	if err != nil {
		return err
	}
	own := valueChecksum(key, value)
	if len(sums) != 2*checksumSize || !bytes.Equal(own, sums[:checksumSize]) && !bytes.Equal(own, sums[checksumSize:]) {
		return s.damaged("%s is not what was written", key)
	}
	return nil
}

// missing reports whether a store has no value, as raft.StableStore says it.
func missing(err error) bool { return err != nil && err.Error() == "not found" }
