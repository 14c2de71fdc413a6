package state

import (
	"crypto/sha256"
	"encoding/binary"
)

// ContentHash is Hash without the log, the index, nonces and outcomes: what an
// invalid command must leave alone.
func (s *State) ContentHash() [32]byte {
	h := sha256.New()
	_ = binary.Write(h, binary.BigEndian, s.clock)
	_ = s.writeTables(h, verifiedTables())
	return [32]byte(h.Sum(nil))
}

// VerifiedTables names the tables that untrusted snapshots are checked for, by
// record number.
func VerifiedTables() map[byte]string {
	names := make(map[byte]string)
	for _, t := range verifiedTables() {
		names[t.number] = t.name
	}
	return names
}

// Rewraps counts the batches and refusals to a KEK version.
func (s *State) Rewraps(keyring string, kek uint32) int {
	return len(s.reader().batches(keyring, kek)) + len(s.reader().refusedRewraps(keyring, kek))
}

// VerifyStatements is what Restore does without trust.
func (s *State) VerifyStatements() error {
	v, err := s.toVerify()
	if err == nil {
		_, err = v.run(inOrder)
	}
	return err
}

// Nonces and Outcomes count what is remembered.
func (s *State) Nonces() int { return len(list[nonce](s.db.Txn(false), tableNonce, byID, []byte{})) }
func (s *State) Outcomes() int {
	return len(list[Outcome](s.db.Txn(false), tableOutcome, byID, []byte{}))
}

// Resealed counts the statements behind a node's copies.
func (s *State) Resealed(node string) int {
	return len(list[resealed](s.db.Txn(false), tableResealed, byNode, prefixKey(node)))
}
