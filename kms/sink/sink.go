// Package sink gives copies of a node's access log to others: a file, syslog, an
// OpenTelemetry collector. A copy is made of what is durable in the log already; it
// never makes an operation wait. What a sink does not take in time is dropped and
// counted, and stays in the log.
package sink

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/conclave-kms/conclave/kms/audit"
)

const (
	queueLength = 8192 // entries
	batchLength = 256  // entries given to a sink at once

	firstRetry = time.Second
	lastRetry  = 30 * time.Second
	tryTime    = 10 * time.Second // of one attempt
	endTime    = 2 * time.Second  // for what is left when the node stops
)

// errRefused is wrapped by a sink's error where trying again is of no use.
var errRefused = errors.New("the copy was refused for good")

// writer is a sink. One goroutine uses it.
type writer interface {
	// write gives entries away and returns how many of them can never be. After an
	// error all are tried again.
	write(ctx context.Context, entries []audit.Entry) (lost int, err error)
	close() error
}

// Queue is a sink with what waits for it.
type Queue struct {
	name    string
	w       writer
	log     *slog.Logger
	retry   time.Duration
	entries chan audit.Entry
	stop    context.CancelFunc
	stopped chan struct{}

	mu     sync.RWMutex // held for reading by Put; entries is closed under it
	closed bool

	sent, dropped atomic.Uint64
}

func start(name string, w writer, log *slog.Logger, length int, retry time.Duration) *Queue {
	ctx, stop := context.WithCancel(context.Background())
	q := &Queue{name: name, w: w, log: log, retry: retry, entries: make(chan audit.Entry, length), stop: stop, stopped: make(chan struct{})}
	go q.run(ctx)
	return q
}

// Name says which sink it is.
func (q *Queue) Name() string { return q.name }

// Sent returns how many entries the sink has taken.
func (q *Queue) Sent() uint64 { return q.sent.Load() }

// Dropped returns how many entries the sink did not take.
func (q *Queue) Dropped() uint64 { return q.dropped.Load() }

// Put hands over a copy. It never blocks.
func (q *Queue) Put(e audit.Entry) {
	q.mu.RLock()
	defer q.mu.RUnlock()
	if !q.closed {
		select {
		case q.entries <- e:
			return
		default:
		}
	}
	q.dropped.Add(1)
}

// Close gives away what waits, for a short time, and ends. It may be called more than once.
func (q *Queue) Close() error {
	q.mu.Lock()
	first := !q.closed
	q.closed = true
	if first {
		close(q.entries)
	}
	q.mu.Unlock()
	if !first {
		<-q.stopped
		return nil
	}
	t := time.AfterFunc(endTime, q.stop)
	<-q.stopped
	t.Stop()
	q.stop()
	return q.w.close()
}

// run gives entries away until the queue is closed and empty or ctx ends.
func (q *Queue) run(ctx context.Context) {
	defer close(q.stopped)
	batch := make([]audit.Entry, 0, batchLength)
	for e := range q.entries {
		batch = q.fill(append(batch[:0], e))
		lost, err := q.give(ctx, batch)
		if err != nil {
			lost = len(batch)
		}
		q.dropped.Add(uint64(lost))
		q.sent.Add(uint64(len(batch) - lost))
	}
}

// fill adds what waits already.
func (q *Queue) fill(batch []audit.Entry) []audit.Entry {
	for len(batch) < batchLength {
		select {
		case e, ok := <-q.entries:
			if !ok {
				return batch
			}
			batch = append(batch, e)
		default:
			return batch
		}
	}
	return batch
}

// give tries until the sink takes the batch, refuses it for good, or ctx ends.
func (q *Queue) give(ctx context.Context, batch []audit.Entry) (lost int, err error) {
	wait := q.retry
	for failed := false; ; failed = true {
		lost, err = q.try(ctx, batch)
		switch {
		case err == nil:
			if failed {
				q.log.InfoContext(ctx, "the sink takes copies of the access log again", "sink", q.name)
			}
			return lost, nil
		case errors.Is(err, errRefused):
			q.log.WarnContext(ctx, "a sink refused copies of the access log; they are in the log", "sink", q.name, "entries", len(batch), "err", err)
			return 0, err
		case !failed:
			q.log.WarnContext(ctx, "a sink takes no copies of the access log; trying on, and dropping what it does not take in time", "sink", q.name, "err", err)
		}
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return 0, err
		}
		wait = min(2*wait, lastRetry)
	}
}

func (q *Queue) try(ctx context.Context, batch []audit.Entry) (int, error) {
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	ctx, cancel := context.WithTimeout(ctx, tryTime)
	defer cancel()
	return q.w.write(ctx, batch)
}

// Log is an access log: Append returns when an entry is durable.
type Log interface {
	Append(ctx context.Context, e audit.Entry) error
}

// Copied is a log of which sinks get copies.
type Copied struct {
	Log
	Sinks []*Queue
}

// Append is that of the log; a durable entry goes to the sinks.
func (c Copied) Append(ctx context.Context, e audit.Entry) error {
	if err := c.Log.Append(ctx, e); err != nil {
		return err
	}
	for _, q := range c.Sinks {
		q.Put(e)
	}
	return nil
}
