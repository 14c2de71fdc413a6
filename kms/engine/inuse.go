package engine

import (
	"sync"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
)

// inUse remembers the keys of which the cache may hold opened versions, so that
// they can be dropped when the key changes: what was destroyed or suspended does
// not stay in memory until its time is over. Access does not depend on it: every
// request looks at the key's state first. The zero value is empty.
type inUse struct {
	mu   sync.Mutex
	keys map[kms.KeyID]keyRevision
}

type keyRevision struct {
	ring, name string
	revision   uint64
}

// add notes that versions of a key have been opened as of its revision.
func (u *inUse) add(id kms.KeyID, k *state.Key) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if old, ok := u.keys[id]; ok && old.revision <= k.Revision {
		return // a change since then is still to be noticed
	}
	if u.keys == nil {
		u.keys = map[kms.KeyID]keyRevision{}
	}
	u.keys[id] = keyRevision{k.Keyring, k.Name, k.Revision}
}

// changed returns the keys that have another revision in the state, and forgets
// them.
func (u *inUse) changed(st *state.State) []kms.KeyID {
	u.mu.Lock()
	defer u.mu.Unlock()
	var ids []kms.KeyID
	for id, r := range u.keys {
		if k, ok := st.Key(r.ring, r.name); !ok || k.Revision != r.revision {
			ids = append(ids, id)
			delete(u.keys, id)
		}
	}
	return ids
}

// forgetChanged drops the opened versions of keys that have changed.
func (e *Engine) forgetChanged(st *state.State) {
	for _, id := range e.inUse.changed(st) {
		e.cfg.Cache.ForgetKey(id)
	}
}
