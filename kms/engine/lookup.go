package engine

import (
	"sync"
	"sync/atomic"

	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/state"
)

// lookups remembers what data operations found in the present state, so that a
// key in use is looked up once for each state and not for each request. Records
// of a state never change; a new state starts anew.
type lookups struct{ now atomic.Pointer[lookup] }

type lookup struct {
	st   *state.State
	mu   sync.RWMutex
	keys map[keyName]found
}

type keyName struct{ ring, key string }

// found are the records of a resource; nil where there is none.
type found struct {
	ring *state.Keyring
	key  *state.Key
	refs *references // of a key only
}

// references are the versions of a key that can be opened here.
type references struct {
	mu  sync.RWMutex
	all map[uint32]sealedReference
}

// sealedReference says where a version's material is, and the KEK copy for it.
type sealedReference struct {
	ref    keyring.KeyRef
	sealed []byte
	last   *atomic.Int64 // hour of the version's last use here
}

// find returns the resource with the revisions of the state, and its records.
func (l *lookups) find(st *state.State, r resource) (resource, found) {
	if r.level < aKey {
		return r.find(st)
	}
	now := l.now.Load()
	if now == nil || now.st != st {
		now = &lookup{st: st, keys: map[keyName]found{}}
		l.now.Store(now)
	}
	name := keyName{r.keyring, r.key}
	now.mu.RLock()
	f, ok := now.keys[name]
	now.mu.RUnlock()
	if !ok {
		if r, f = r.find(st); f.key == nil {
			return r, f // who guesses names does not fill the memory
		}
		f.refs = &references{all: map[uint32]sealedReference{}}
		now.mu.Lock()
		now.keys[name] = f
		now.mu.Unlock()
	}
	r.ringRevision, r.keyRevision = f.ring.Revision, f.key.Revision
	return r, f
}

// get returns what put has stored for a version.
func (r *references) get(version uint32) (sealedReference, bool) {
	r.mu.RLock()
	defer r.mu.RUnlock()
	s, ok := r.all[version]
	return s, ok
}

func (r *references) put(version uint32, s sealedReference) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.all[version] = s
}
