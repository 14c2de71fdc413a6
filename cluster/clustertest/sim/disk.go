package sim

import (
	"errors"
	"slices"
	"sync"
	"time"

	"github.com/hashicorp/raft"
)

// errNoKey is what raft-boltdb returns; Raft knows it by its text.
var errNoKey = errors.New("not found")

// image is what a disk holds: Raft's log, term and vote.
type image struct {
	first uint64 // of the log, 0 when it is empty
	log   []*raft.Log
	words map[string]uint64
	texts map[string][]byte
}

func newImage() *image { return &image{words: map[string]uint64{}, texts: map[string][]byte{}} }

func (m *image) last() uint64 {
	if len(m.log) == 0 {
		return 0
	}
	return m.first + uint64(len(m.log)) - 1
}

func (m *image) store(logs []*raft.Log) {
	for _, l := range logs {
		if len(m.log) == 0 {
			m.first = l.Index
		}
		switch at := l.Index - m.first; {
		case l.Index < m.first || at > uint64(len(m.log)):
			m.first, m.log = l.Index, []*raft.Log{l} // after a snapshot that skipped entries
		case at == uint64(len(m.log)):
			m.log = append(m.log, l)
		default:
			m.log[at] = l
		}
	}
}

func (m *image) remove(from, to uint64) {
	if len(m.log) == 0 {
		return
	}
	from, to = max(from, m.first), min(to, m.last())
	if from > to {
		return
	}
	switch {
	case from == m.first:
		m.log, m.first = slices.Clone(m.log[to-m.first+1:]), to+1
	default:
		m.log = slices.Clone(m.log[:from-m.first]) // Raft never deletes in the middle
	}
	if len(m.log) == 0 {
		m.first = 0
	}
}

func (m *image) clone() *image {
	c := newImage()
	c.first, c.log = m.first, slices.Clone(m.log)
	for k, v := range m.words {
		c.words[k] = v
	}
	for k, v := range m.texts {
		c.texts[k] = v
	}
	return c
}

// disk is the log store of one life of a host. A write takes time; it is there for
// readers when it returns, as with a synchronous store. What is under way when the
// host crashes may be there afterwards or not. A lying disk returns before the write
// is safe, and a crash loses what it has not yet made so.
type disk struct {
	life  *life
	lying bool

	slot chan struct{} // held by the one write under way

	mu      sync.Mutex
	now     *image
	pending func(*image)   // the write under way
	unsafe  []func(*image) // of a lying disk: writes that are not safe yet
	safe    *image         // of a lying disk
	writes  uint64
}

func newDisk(l *life, m *image, lying bool) *disk {
	d := &disk{life: l, now: m, lying: lying, slot: make(chan struct{}, 1)}
	if lying {
		d.safe = m.clone()
	}
	return d
}

// lazy is how many writes a lying disk gathers before it makes them safe.
const lazy = 16

// write carries out a change that takes as long as the disk is slow.
func (d *disk) write(change func(*image)) error {
	h := d.life.host
	h.gate(d.life)
	d.slot <- struct{}{}
	defer func() { <-d.slot }()
	d.mu.Lock()
	d.writes++
	wait := h.diskTime(d.writes)
	d.pending = change
	d.mu.Unlock()
	if wait > 0 {
		select {
		case <-time.After(wait):
		case <-d.life.died:
		}
	}
	h.gate(d.life)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pending = nil
	change(d.now)
	if d.lying {
		if d.unsafe = append(d.unsafe, change); len(d.unsafe) == lazy {
			d.flush(lazy)
		}
	}
	return nil
}

func (d *disk) flush(n int) {
	for _, c := range d.unsafe[:n] {
		c(d.safe)
	}
	d.unsafe = slices.Clone(d.unsafe[n:])
}

// crash ends the life and returns what is then on the disk: no write falls between the two, which
// the life would tell others of. roll decides whether the write under way is there, and how much of
// what a lying disk owes.
func (d *disk) crash(roll dice) *image {
	d.mu.Lock()
	defer d.mu.Unlock()
	close(d.life.died)
	if d.lying {
		d.flush(int(uint64(roll) % uint64(len(d.unsafe)+1)))
		return d.safe.clone()
	}
	m := d.now.clone()
	if d.pending != nil && roll.chance(0.5) {
		d.pending(m)
	}
	return m
}

// FirstIndex implements raft.LogStore.
func (d *disk) FirstIndex() (uint64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.now.first, nil
}

// LastIndex implements raft.LogStore.
func (d *disk) LastIndex() (uint64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.now.last(), nil
}

// GetLog implements raft.LogStore.
func (d *disk) GetLog(index uint64, l *raft.Log) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if len(d.now.log) == 0 || index < d.now.first || index > d.now.last() {
		return raft.ErrLogNotFound
	}
	*l = *d.now.log[index-d.now.first]
	return nil
}

// StoreLog implements raft.LogStore.
func (d *disk) StoreLog(l *raft.Log) error { return d.StoreLogs([]*raft.Log{l}) }

// StoreLogs implements raft.LogStore. A hostile leader puts its own entries in the
// place of others here: its cache, its followers and its own machine all get what is
// stored.
func (d *disk) StoreLogs(logs []*raft.Log) error {
	d.life.host.corrupt(d.life, logs)
	kept := make([]*raft.Log, len(logs))
	for i, l := range logs {
		c := *l
		kept[i] = &c
	}
	return d.write(func(m *image) { m.store(kept) })
}

// DeleteRange implements raft.LogStore.
func (d *disk) DeleteRange(min, max uint64) error {
	return d.write(func(m *image) { m.remove(min, max) })
}

// Set implements raft.StableStore.
func (d *disk) Set(key, val []byte) error {
	k, v := string(key), slices.Clone(val)
	return d.write(func(m *image) { m.texts[k] = v })
}

// Get implements raft.StableStore.
func (d *disk) Get(key []byte) ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	v, ok := d.now.texts[string(key)]
	if !ok {
		return nil, errNoKey
	}
	return slices.Clone(v), nil
}

// SetUint64 implements raft.StableStore.
func (d *disk) SetUint64(key []byte, val uint64) error {
	k := string(key)
	return d.write(func(m *image) { m.words[k] = val })
}

// GetUint64 implements raft.StableStore.
func (d *disk) GetUint64(key []byte) (uint64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	v, ok := d.now.words[string(key)]
	if !ok {
		return 0, errNoKey
	}
	return v, nil
}

// Close implements cluster.LogStore.
func (*disk) Close() error { return nil }
