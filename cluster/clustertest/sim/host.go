package sim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/hashicorp/raft"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// host is a machine with a node: what outlasts the node's process.
type host struct {
	s    *schedule
	id   string
	site string
	keys *statetest.Node
	dice dice

	mu      sync.Mutex
	life    *life // nil: down
	born    int   // lives so far
	image   *image
	dir     string
	offset  time.Duration // of its wall clock
	slow    time.Duration // of a disk write, at most
	paused  chan struct{} // not nil: until it is closed the host stands still
	hostile bool
	swaps   map[string][]byte // a hostile leader's: what it writes in the place of a command
	lied    bool              // it has been hostile
	astray  bool              // its wall clock has been wrong
}

// life is one process of a node, from its start to its end or crash.
type life struct {
	host *host
	wire *wire
	disk *disk
	node *cluster.Node
	died chan struct{}

	ended atomic.Bool // the node has halted and is to be started again
}

func (l *life) isDead() bool {
	select {
	case <-l.died:
		return true
	default:
		return false
	}
}

// gate lets a goroutine of the life go on unless the host is paused.
func (h *host) gate(l *life) {
	h.mu.Lock()
	p := h.paused
	h.mu.Unlock()
	if p == nil || l.isDead() {
		return
	}
	select {
	case <-p:
	case <-l.died:
	}
}

// diskTime returns how long the nth write takes.
func (h *host) diskTime(n uint64) time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.dice.of("disk").nth(n).upTo(h.slow)
}

// now returns the time that the host's wall clock shows, Unix milliseconds.
func (h *host) now() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return time.Now().Add(h.offset).UnixMilli()
}

func (h *host) set(f func(h *host)) {
	h.mu.Lock()
	defer h.mu.Unlock()
	f(h)
}

// alive returns the life if the node is up.
func (h *host) alive() *life {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.life
}

func (h *host) pause() {
	h.set(func(h *host) {
		if h.paused == nil {
			h.paused = make(chan struct{})
		}
	})
}

func (h *host) resume() {
	h.set(func(h *host) {
		if h.paused != nil {
			close(h.paused)
			h.paused = nil
		}
	})
}

// start starts the node from what is on the host's disk.
func (h *host) start() error {
	h.mu.Lock()
	l := &life{host: h, died: make(chan struct{})}
	l.disk = newDisk(l, h.image, h.s.o.LyingDisks)
	l.wire = newWire(l, h.s.timing.RPC)
	h.mu.Unlock()

	h.s.net.join(h.id, l)
	n, err := cluster.Open(context.Background(), h.config(l))
	if err != nil {
		h.s.net.join(h.id, nil)
		return fmt.Errorf("node %s does not start: %w", h.id, err)
	}
	h.mu.Lock()
	l.node, h.life = n, l
	h.mu.Unlock()
	if err := n.Probation(); err != nil {
		h.rolledBack(err)
	}
	go func() {
		err, ok := <-n.Done()
		switch {
		case !ok || l.isDead():
		case errors.Is(err, cluster.ErrRolledBack):
			h.rolledBack(err)
			l.ended.Store(true) // it asks to be started again
		case errors.Is(err, cluster.ErrStaleLog):
			l.ended.Store(true)
		default:
			h.s.watch.fail("node %s halted: %v", h.id, err)
		}
	}()
	return nil
}

// rolledBack is called when the node takes its disk for one that was put back. Only a disk
// that lies gives it reason to.
func (h *host) rolledBack(err error) {
	h.s.count("taken for rolled back")
	if !h.s.o.LyingDisks {
		h.s.watch.fail("node %s has forgotten nothing: %v", h.id, err)
	}
}

// leave makes the directory of the next life, as it is now: a process that has crashed
// may still write to its own.
func (h *host) leave() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.born++
	next := filepath.Join(h.s.dir, fmt.Sprintf("%s.%d", h.id, h.born))
	err := os.CopyFS(next, os.DirFS(h.dir))
	if err == nil {
		err = tighten(next)
	}
	if err != nil {
		h.s.watch.fail("the simulation cannot copy the directory of %s: %v", h.id, err)
	}
	h.dir = next
}

// tighten gives a copied directory the modes that a node insists on.
func tighten(dir string) error {
	return filepath.WalkDir(dir, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if e.IsDir() {
			return os.Chmod(path, 0o700)
		}
		return os.Chmod(path, 0o600)
	})
}

func (h *host) config(l *life) cluster.Config {
	level, logger := slog.LevelError, slog.New(slog.DiscardHandler)
	if h.s.o.Log != nil {
		level, logger = slog.LevelWarn, slog.New(slog.NewTextHandler(noteWriter{h.s}, &slog.HandlerOptions{Level: slog.LevelWarn, ReplaceAttr: withoutTime})).With("node", h.id)
	}
	return cluster.Config{
		NodeID: h.id, DataDir: h.dir, Log: l.disk, Wire: l.wire, Genesis: h.s.world.Signed(), Certificate: h.s.world.certs[h.id],
		Sign: h.keys.Sign, Timing: h.s.timing, Logger: logger, RaftLogLevel: &level,
		FreeSpace: func(string) (uint64, uint64, error) { return 1 << 40, 1 << 40, nil },
		OnApply: func(st *state.State, raw []byte, r state.Result) {
			h.gate(l)
			if !l.isDead() {
				h.s.watch.applied(l, st, raw, r)
			}
		},
		OnRestore: func(st *state.State) {
			if !l.isDead() {
				h.s.watch.restored(l, st)
			}
		},
	}
}

// crash ends the life at once. What is on the disk stays, of the write under way by
// chance.
func (h *host) crash() {
	h.mu.Lock()
	l := h.life
	h.life = nil
	h.mu.Unlock()
	if l == nil {
		return
	}
	m := l.disk.crash(h.dice.of("crash").nth(uint64(h.born)))
	h.set(func(h *host) { h.image = m })
	h.leave()
	h.end(l)
}

// stop ends the life in good order.
func (h *host) stop() {
	h.mu.Lock()
	l := h.life
	h.life = nil
	h.mu.Unlock()
	if l == nil {
		return
	}
	h.s.net.join(h.id, nil)
	if err := l.node.Close(); err != nil {
		h.s.watch.fail("node %s does not stop: %v", h.id, err)
	}
	m := l.disk.crash(0)
	h.set(func(h *host) { h.image = m })
	h.leave()
}

// end has the rest of a dead life close in the background.
func (h *host) end(l *life) {
	h.s.net.join(h.id, nil)
	h.s.dying.Go(func() { _ = l.node.Close() })
}

// corrupt is called with the entries that the host is about to store. A hostile leader
// puts others in the place of those that it was made to.
func (h *host) corrupt(l *life, logs []*raft.Log) {
	h.mu.Lock()
	node := l.node
	mine := h.hostile && len(h.swaps) > 0
	h.mu.Unlock()
	if !mine || node == nil || node.Status().State != "leader" {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, e := range logs {
		if forged, ok := h.swaps[string(e.Data)]; ok && e.Type == raft.LogCommand {
			delete(h.swaps, string(e.Data))
			e.Data = forged
			h.s.count("entries forged")
		}
	}
}

// noteWriter passes the nodes' own log on to who follows a schedule.
type noteWriter struct{ s *schedule }

// Write implements io.Writer.
func (w noteWriter) Write(b []byte) (int, error) {
	w.s.note("%s", bytes.TrimSpace(b))
	return len(b), nil
}

func withoutTime(_ []string, a slog.Attr) slog.Attr {
	if a.Key == slog.TimeKey {
		return slog.Attr{}
	}
	return a
}
