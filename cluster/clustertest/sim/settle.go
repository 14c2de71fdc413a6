package sim

import (
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"time"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/kms/state"
)

// recovery is how long a healed cluster may take to agree, in simulated time.
const recovery = 2 * time.Minute

// settle heals everything and checks what must hold then: the cluster goes on, all
// nodes have one log and one state, and everything acknowledged is in it.
func (s *schedule) settle() error {
	s.note("heal")
	s.net.healAll()
	for _, id := range s.ids {
		h := s.hosts[id]
		h.resume()
		h.set(func(h *host) { h.slow, h.offset, h.hostile, h.swaps = time.Millisecond, 0, false, map[string][]byte{} })
		if h.alive() == nil {
			s.revive(h)
		}
		if h.alive() == nil {
			return fmt.Errorf("node %s is down", id)
		}
	}
	s.clients.Wait()
	last, err := s.last()
	if err != nil {
		return err
	}
	if err := s.reach(last); err != nil {
		return err
	}
	var sum [32]byte
	for i, id := range s.ids {
		st := s.hosts[id].alive().node.State()
		switch h := st.Hash(); {
		case i == 0:
			sum = h
		case h != sum:
			return fmt.Errorf("the state of node %s at entry %d differs from that of %s", id, last, s.ids[0])
		}
	}
	s.sameLogs()
	s.suspicions()
	return nil
}

// suspicions looks at what the nodes suspect of others: none may be of an honest node with
// a right clock.
func (s *schedule) suspicions() {
	for _, id := range s.ids {
		for _, x := range s.hosts[id].alive().node.Status().Suspicions {
			leader, origin := s.hosts[x.Leader], s.hosts[x.Origin]
			s.count("suspicions")
			if !leader.lied && (x.Kind != cluster.Backdated || !origin.astray) {
				s.watch.fail("node %s suspects without a reason: %s", id, x.Text)
			}
		}
	}
}

// last has the healed cluster take one more command and returns its index.
func (s *schedule) last() (uint64, error) {
	limit := time.Now().Add(recovery)
	for n := 0; ; n++ {
		s.mend()
		h := s.hosts[s.ids[n%len(s.ids)]]
		if h.alive() == nil {
			return 0, fmt.Errorf("node %s is down", h.id)
		}
		raw := s.sign(h, state.Tick{})
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		r, err := h.alive().node.Propose(ctx, raw)
		cancel()
		if r.Index != 0 {
			s.watch.acknowledged(raw, r)
			return r.Index, nil
		}
		if time.Now().After(limit) {
			return 0, fmt.Errorf("the healed cluster took no command for %v: %w", recovery, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// reach waits until all nodes have applied the same index, at least from.
func (s *schedule) reach(from uint64) error {
	limit := time.Now().Add(recovery)
	for {
		s.mend()
		low, high := ^uint64(0), from
		for _, id := range s.ids {
			l := s.hosts[id].alive()
			if l == nil {
				return fmt.Errorf("node %s is down", id)
			}
			i := l.node.State().Index()
			low, high = min(low, i), max(high, i)
		}
		if low == high {
			return nil
		}
		if time.Now().After(limit) {
			return fmt.Errorf("nodes are at entry %d while others are at %d, %v after all was healed", low, high, recovery)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// sameLogs compares what is on the disks with what was applied and acknowledged.
func (s *schedule) sameLogs() {
	w := s.watch
	w.mu.Lock()
	defer w.mu.Unlock()
	for index, sum := range w.acked {
		if e, ok := w.log[index]; !ok || e.sum != sum {
			w.broken("the acknowledged command at entry %d is lost", index)
		}
	}
	for _, id := range s.ids {
		d := s.hosts[id].alive().disk
		d.mu.Lock()
		for _, l := range d.now.log {
			e, ok := w.log[l.Index]
			if l.Index > w.last {
				break
			}
			if l.Type == raft.LogCommand && (!ok || e.sum != sha256.Sum256(l.Data)) {
				w.broken("the log of node %s has another command as entry %d than was applied", id, l.Index)
			}
		}
		d.mu.Unlock()
	}
}

// trace hashes the log that came about, with the kinds of its outcomes.
func (w *watch) trace() uint64 {
	w.mu.Lock()
	defer w.mu.Unlock()
	h := fnv.New64a()
	for i := uint64(0); i <= w.last; i++ {
		if e, ok := w.log[i]; ok {
			b := binary.BigEndian.AppendUint64(nil, i)
			b = binary.BigEndian.AppendUint64(b, uint64(e.kind))
			b = binary.BigEndian.AppendUint64(b, uint64(e.clock))
			_, _ = h.Write(b) // never fails
		}
	}
	return h.Sum64()
}
