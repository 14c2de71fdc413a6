package cluster

import (
	"errors"
	"fmt"
	"sync"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/canon"
)

// keyCut is the key in Raft's stable store of how far the log had gone before a leader had
// its end removed: a position in canonical form.
const keyCut = "conclave/cut"

// trimmedLog is the log as Raft sees it. It remembers what was removed at either end.
//
// At the beginning: when a snapshot reaches up to an entry, and the log goes on far
// beyond it with entries that are not committed, Raft removes all up to that entry, and then
// refuses the leader's entries that follow it, since it no longer finds the term of that
// entry in the log. So does a node that has begun its log after a snapshot from the leader.
// The snapshot says the term.
//
// At the end: entries that a former leader has sent, and that were never committed, are removed
// on the word of a later one. A node that ended right then has not forgotten what it promised.
type trimmedLog struct {
	raft.LogStore
	stable raft.StableStore

	mu  sync.Mutex
	end position // of the latest snapshot that the machine has made or taken
	cut position
}

// openTrimmed reads what a former run has noted.
func openTrimmed(logs raft.LogStore, stable raft.StableStore) (*trimmedLog, error) {
	t := &trimmedLog{LogStore: logs, stable: stable}
	b, err := stable.Get([]byte(keyCut))
	if missing(err) || err == nil && len(b) == 0 {
		return t, nil
	}
	if err == nil {
		err = canon.Unmarshal(b, &t.cut)
	}
	if err != nil {
		return nil, kms.Wrap(kms.Unavailable, err, fmt.Sprintf("cannot read from the log how far it had gone: %v", err), storeFix)
	}
	return t, nil
}

// snapshotAt notes that the machine has made or taken a snapshot which ends with the
// entry at an index, of a term.
func (t *trimmedLog) snapshotAt(index, term uint64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if index > t.end.Index {
		t.end = position{Index: index, LogTerm: term}
	}
}

// GetLog implements raft.LogStore. Of the entry at the snapshot's end, when the log begins
// after it, only the index and the term are right: Raft looks at no more of the entry before those that
// it appends, and sends none whose predecessor it does not have.
func (t *trimmedLog) GetLog(index uint64, l *raft.Log) error {
	err := t.LogStore.GetLog(index, l)
	if !errors.Is(err, raft.ErrLogNotFound) {
		return err
	}
	t.mu.Lock()
	end := t.end
	t.mu.Unlock()
	if index == 0 || index != end.Index {
		return err
	}
	if first, e := t.FirstIndex(); e != nil || first != index+1 {
		return errors.Join(err, e)
	}
	*l = raft.Log{Index: index, Term: end.LogTerm, Type: raft.LogNoop}
	return nil
}

// term returns the term of an entry, if the log or the latest snapshot says it.
func (t *trimmedLog) term(index uint64) (uint64, bool) {
	var l raft.Log
	if t.LogStore.GetLog(index, &l) == nil {
		return l.Term, true
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.end.LogTerm, index > 0 && index == t.end.Index
}

// DeleteRange implements raft.LogStore. Where the end of the log goes it is noted before.
func (t *trimmedLog) DeleteRange(min, max uint64) error {
	last, err := t.LastIndex()
	if err != nil {
		return err
	}
	if last > 0 && max >= last {
		if err := t.noteCut(last); err != nil {
			return fmt.Errorf("cannot note the end of the log before it is removed: %w", err)
		}
	}
	return t.LogStore.DeleteRange(min, max)
}

func (t *trimmedLog) noteCut(last uint64) error {
	var l raft.Log
	if err := t.LogStore.GetLog(last, &l); err != nil {
		return err
	}
	t.mu.Lock()
	cut := t.cut.join(position{Index: l.Index, LogTerm: l.Term})
	t.mu.Unlock()
	if err := t.stable.Set([]byte(keyCut), canon.Marshal(cut)); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.cut = t.cut.join(cut)
	return nil
}

// reached returns a position together with how far the log went before its end was removed.
// A node at p has kept what it had promised up to there, as far as a later leader let it.
func (t *trimmedLog) reached(p position) position {
	t.mu.Lock()
	defer t.mu.Unlock()
	return p.join(t.cut)
}
