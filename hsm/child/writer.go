package child

import (
	"context"
	"runtime"
	"sync"

	"github.com/conclave-kms/conclave/kms/secret"
)

// writer sends frames from many goroutines. There is no goroutine for it: whoever
// finds nobody writing writes, and frames that come meanwhile wait in locked memory
// and go out together in the next write.
type writer struct {
	// write writes as much as goes without waiting and returns the rest.
	write func(b []byte) (rest []byte, err error)
	// writeAll waits. It runs on a goroutine of its own.
	writeAll func(b []byte) error
	// yield reports whether others are likely to add frames at once.
	yield func() bool

	mu       sync.Mutex
	buffers  [2]*secret.Bytes
	current  int
	pending  []byte // frames in buffers[current]
	flushing bool
	err      error         // nothing more can be written
	drained  chan struct{} // closed when there is room again; nil when nobody waits
}

func newWriter(write func([]byte) ([]byte, error), writeAll func([]byte) error, yield func() bool) (*writer, error) {
	w := &writer{write: write, writeAll: writeAll, yield: yield}
	for i := range w.buffers {
		var err error
		if w.buffers[i], err = secret.New(maxFrame); err != nil {
			w.buffers[0].Destroy()
			return nil, unavailablef("%v", err)
		}
	}
	w.pending = w.buffers[0].Reveal()[:0]
	return w, nil
}

// send puts a frame on its way. It waits where the other side does not read. The
// error is that of ctx, or says that nothing can be written any more.
func (w *writer) send(ctx context.Context, m *message) error {
	size := m.size()
	if size > maxFrame {
		return errFrame
	}
	w.mu.Lock()
	for w.err == nil && len(w.pending)+size > maxFrame {
		if w.drained == nil {
			w.drained = make(chan struct{})
		}
		drained := w.drained
		w.mu.Unlock()
		select {
		case <-drained:
		case <-ctx.Done():
			return ctx.Err()
		}
		w.mu.Lock()
	}
	if w.err != nil {
		defer w.mu.Unlock()
		return w.err
	}
	w.pending = m.append(w.pending)
	if w.flushing {
		w.mu.Unlock()
		return nil
	}
	w.flushing = true
	if w.yield() {
		w.mu.Unlock()
		runtime.Gosched() // others have frames to add
		w.mu.Lock()
	}
	w.flush()
	return nil
}

// flush writes what is pending until nothing is, or leaves that to a goroutine where
// it would have to wait. It is called with mu held, which it gives back.
func (w *writer) flush() {
	for {
		out := w.pending
		w.current ^= 1
		w.pending = w.buffers[w.current].Reveal()[:0]
		w.room()
		w.mu.Unlock()
		rest, err := w.write(out)
		if err == nil && len(rest) > 0 {
			go func() {
				err := w.writeAll(rest)
				if w.written(out, err) {
					w.flush()
				}
			}()
			return
		}
		if !w.written(out, err) {
			return
		}
	}
}

// written notes that out has gone. It returns true, with mu held, when there is more.
func (w *writer) written(out []byte, err error) bool {
	secret.Wipe(out)
	w.mu.Lock()
	if w.err == nil {
		w.err = err
	}
	if w.err == nil && len(w.pending) > 0 {
		return true
	}
	w.flushing = false
	if w.err != nil {
		w.dispose()
	}
	w.mu.Unlock()
	return false
}

// room wakes those who wait for it.
func (w *writer) room() {
	if w.drained != nil {
		close(w.drained)
		w.drained = nil
	}
}

// end makes send fail with err and gives the memory back once nobody writes.
func (w *writer) end(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
	if !w.flushing {
		w.dispose()
	}
}

func (w *writer) dispose() {
	w.room()
	w.pending = nil
	for _, b := range w.buffers {
		b.Destroy()
	}
}
