package cluster

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"time"

	raftboltdb "github.com/hashicorp/raft-boltdb/v2"
	"go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"

	"github.com/conclave-kms/conclave/kms"
)

// storeFix is the next step when the log's file cannot be used.
const storeFix = "put back a copy of the node's data directory (with an older one the node catches up before it serves), " +
	"or remove the node (conclave node remove) and let the machine join under a new name: a node that forgot its votes does not take part again under the same one"

// lockWait is how long to wait for the lock of another process on the log.
const lockWait = time.Second

// checkStore walks through the file of the log. bbolt panics, partly in goroutines
// of its own, on a file whose pages are damaged; here that becomes an error which
// names the file. What the entries hold is for checkedStore.
func checkStore(path string) error {
	if _, err := os.Stat(path); os.IsNotExist(err) {
		return nil
	}
	db, err := bbolt.Open(path, 0o600, &bbolt.Options{ReadOnly: true, Timeout: lockWait}) // reads no freelist, which is where bbolt panics
	if err != nil {
		return storeError(path, err)
	}
	err = checkStructure(path) // while nobody else writes it
	if err == nil {
		err = walkStore(db)
	}
	if err := errors.Join(err, db.Close()); err != nil {
		return storeError(path, err)
	}
	return nil
}

// openBolt opens the log to be written to. bbolt looks for free pages then, and panics on
// keys that are out of order.
func openBolt(path string) (store *raftboltdb.BoltStore, err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("a page is damaged: %v", r)
		}
	}()
	return raftboltdb.New(raftboltdb.Options{
		Path:        path,
		BoltOptions: &bbolt.Options{Timeout: lockWait, NoFreelistSync: true, FreelistType: bbolt.FreelistMapType},
	})
}

// checkStructure checks the pages of the file.
func checkStructure(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(checkPages(f), f.Close())
}

func walkStore(db *bbolt.DB) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true)) // a page number may point past the end of the file
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("a page is damaged: %v", r)
		}
	}()
	return db.View(func(tx *bbolt.Tx) error {
		found := 0
		err := tx.ForEach(func(name []byte, b *bbolt.Bucket) error {
			found++
			switch string(name) {
			case "logs":
				return walkLog(b)
			case "conf":
				return b.ForEach(func(_, _ []byte) error { return nil })
			}
			return fmt.Errorf("it has a part %q", name)
		})
		if err == nil && found != 0 && found != 2 { // none: made just now
			err = fmt.Errorf("it has %d parts of 2", found)
		}
		return err
	})
}

// walkLog checks that the entries are numbered without a gap.
func walkLog(b *bbolt.Bucket) error {
	var last uint64
	return b.ForEach(func(key, _ []byte) error {
		if len(key) != 8 {
			return fmt.Errorf("after entry %d comes one with a number of %d bytes", last, len(key))
		}
		i := binary.BigEndian.Uint64(key)
		if last != 0 && i != last+1 || i == 0 {
			return fmt.Errorf("after entry %d comes entry %d", last, i)
		}
		last = i
		return nil
	})
}

func storeError(path string, err error) error {
	if errors.Is(err, bolterrors.ErrTimeout) {
		return kms.Wrap(kms.Unavailable, err, "the log "+path+" is in use by another process", "stop it first: two nodes must not share a data directory")
	}
	return kms.Wrap(kms.Unavailable, err, fmt.Sprintf("the log %s is damaged or cannot be read: %v", path, err), storeFix)
}
