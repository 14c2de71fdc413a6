package cluster

import (
	"errors"
	"math/rand/v2"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
)

// failing is a store in which half of all writes of values are lost, as when a disk fails.
type failing struct{ LogStore }

func (s failing) Set(key, value []byte) error {
	if rand.IntN(2) == 0 {
		return syscall.EIO
	}
	return s.LogStore.Set(key, value)
}

// Raft sets its term from two goroutines at once. Whatever is cut short, what is on the disk is what
// was written, and no earlier term than one that was.
func TestTermSetAtOnce(t *testing.T) {
	store, err := openBolt(filepath.Join(t.TempDir(), "raft.db"))
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	s := &checkedStore{LogStore: failing{store}, path: "raft.db"}
	var mu sync.Mutex
	var highest uint64
	var wg sync.WaitGroup
	for i := range uint64(4) {
		wg.Go(func() {
			for term := i + 1; term < 200; term += 1 + rand.Uint64N(4) {
				err := s.SetUint64([]byte(keyTerm), term)
				if err != nil && !errors.Is(err, syscall.EIO) {
					t.Errorf("term %d: %v", term, err)
					return
				}
				mu.Lock()
				if err == nil {
					highest = max(highest, term)
				}
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	if kept, err := s.GetUint64([]byte(keyTerm)); err != nil || kept < highest {
		t.Errorf("after term %d was written the disk says %d, %v", highest, kept, err)
	}
}
