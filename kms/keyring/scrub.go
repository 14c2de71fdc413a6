package keyring

import (
	"runtime"
	"sync"
	"time"
)

// scrubber has the garbage collected after key material went. The material itself
// lies in locked memory and is wiped; the standard library, though, makes forms of
// it that nobody can wipe (AES key schedules, ECDSA keys and what is computed from
// them). Collected they are at least free to be overwritten, and are so at once
// under GODEBUG=clobberfree=1. One collection is not enough: what a pool or a
// cleanup holds goes with the next ones.
type scrubber struct {
	mu      sync.Mutex
	rounds  int // still to come
	running bool
	again   bool // material went meanwhile
}

// stackRoom is more than the deepest of the calls that put key material on the
// stack needs, in bytes.
const stackRoom = 16 << 10

// cleanStack overwrites what lies below the caller's frame. Called before the
// standard library computes with a private key it makes the stack large enough,
// for one that grows leaves a copy behind; called after, it removes what dead
// frames hold.
//
//go:noinline
func cleanStack() {
	var room [stackRoom]byte
	clear(room[:])
	runtime.KeepAlive(&room)
}

const (
	scrubRounds = 3
	scrubEvery  = time.Second
	scrubRest   = 10 * time.Second // between series, so that constant evictions cost little
)

// soon starts a series of collections, or has the one under way followed by
// another.
func (s *scrubber) soon() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.running {
		s.again = true
		return
	}
	s.running, s.rounds = true, scrubRounds
	time.AfterFunc(scrubEvery, s.collect)
}

func (s *scrubber) collect() {
	runtime.GC()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.rounds--
	switch {
	case s.rounds > 0:
		time.AfterFunc(scrubEvery, s.collect)
	case s.again:
		s.again, s.rounds = false, scrubRounds
		time.AfterFunc(scrubRest, s.collect)
	default:
		s.running = false
	}
}
