package engine

import (
	"hash/maphash"
	"sync"

	"github.com/conclave-kms/conclave/kms"
)

// decisionKey is everything that an access decision depends on.
type decisionKey struct {
	id         kms.Identity
	action     Action
	resource   resource
	generation uint64 // of the parsed policy set
}

const (
	decisionShards   = 16
	decisionsInShard = 1024
)

// decisionCache remembers access decisions, at most
// decisionShards*decisionsInShard of them; the zero value is empty. A hit
// allocates nothing.
type decisionCache struct {
	seedOnce sync.Once
	seed     maphash.Seed
	shards   [decisionShards]decisionShard
}

type decisionShard struct {
	mu sync.RWMutex
	m  map[decisionKey]bool
}

func (c *decisionCache) shard(k decisionKey) *decisionShard {
	c.seedOnce.Do(func() { c.seed = maphash.MakeSeed() })
	return &c.shards[maphash.Comparable(c.seed, k)%decisionShards]
}

func (c *decisionCache) get(k decisionKey) (allowed, known bool) {
	s := c.shard(k)
	s.mu.RLock()
	allowed, known = s.m[k]
	s.mu.RUnlock()
	return allowed, known
}

// put remembers a decision; a full shard first forgets one that the map's order
// picks, which is arbitrary.
func (c *decisionCache) put(k decisionKey, allowed bool) {
	s := c.shard(k)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.m == nil {
		s.m = make(map[decisionKey]bool)
	}
	if _, ok := s.m[k]; !ok && len(s.m) >= decisionsInShard {
		for old := range s.m {
			delete(s.m, old)
			break
		}
	}
	s.m[k] = allowed
}
