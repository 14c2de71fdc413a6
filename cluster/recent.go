package cluster

import (
	"crypto/sha256"
	"sync"

	"github.com/conclave-kms/conclave/kms/state"
)

// keepResults is how many of the latest results a node remembers: many more than
// are applied between an entry and the moment when whoever waits for it looks.
const keepResults = 1024

// recent holds what became here of the latest entries. What a leader says became
// of a forwarded command is not believed, only where in the log it is to be found.
type recent struct {
	mu      sync.Mutex
	results [keepResults]struct {
		command [sha256.Size]byte
		result  state.Result
	}
}

// add remembers the result of the entry raw.
func (r *recent) add(raw []byte, result state.Result) {
	sum := sha256.Sum256(raw)
	r.mu.Lock()
	defer r.mu.Unlock()
	at := &r.results[result.Index%keepResults]
	at.command, at.result = sum, result
}

// of returns the result of raw as the entry at index; false if that entry is
// another, or came with a snapshot, or is too long ago.
func (r *recent) of(index uint64, raw []byte) (state.Result, bool) {
	sum := sha256.Sum256(raw)
	r.mu.Lock()
	defer r.mu.Unlock()
	at := &r.results[index%keepResults]
	if index == 0 || at.result.Index != index || at.command != sum {
		return state.Result{}, false
	}
	return at.result, true
}
