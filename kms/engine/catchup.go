package engine

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// catchUpLimit bounds the wait for the leader's answer to what a data operation has to ask.
const catchUpLimit = 3 * time.Second

// catchUpEvery is the least time between the questions to the leader that refusals
// cause, so that nobody can keep it busy with requests that are refused.
const catchUpEvery = 100 * time.Millisecond

// catchUps are the questions to the leader on behalf of data operations.
type catchUps struct {
	mu   sync.Mutex
	next *catchUp // has not asked yet, so it will do for whoever comes now
	last *catchUp // the latest of all
}

// catchUp is one question for all who wait for it.
type catchUp struct {
	asked time.Time
	done  chan struct{} // closed when the answer is there
	err   error
}

// catchUp returns when this node has everything that the cluster had committed when it
// was called. At most one question is under way and one waits behind it. Errors:
// kms.Unavailable, ctx.Err().
func (e *Engine) catchUp(ctx context.Context) error {
	u := &e.catchUps
	u.mu.Lock()
	c := u.next
	if c == nil {
		c = &catchUp{done: make(chan struct{})}
		go e.ask(c, u.last)
		u.next, u.last = c, c
	}
	u.mu.Unlock()
	select {
	case <-c.done:
		return c.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// ask asks when the question before has its answer. It belongs to no single request, so
// the going away of one is nothing to the others.
func (e *Engine) ask(c, before *catchUp) {
	if before != nil {
		<-before.done
		time.Sleep(time.Until(before.asked.Add(catchUpEvery)))
	}
	e.catchUps.mu.Lock()
	e.catchUps.next = nil // what is committed from now on the answer may not cover
	e.catchUps.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), catchUpLimit)
	defer cancel()
	c.asked = time.Now()
	c.err = e.cluster.Barrier(ctx)
	close(c.done)
}

// catchUp is Engine.catchUp, once in a request.
func (rq *request) catchUp(ctx context.Context, e *Engine) error {
	if !rq.caughtUp {
		rq.caughtUp, rq.notCaughtUp = true, e.catchUp(ctx)
	}
	return rq.notCaughtUp
}

// mayBeBehind reports whether a data operation was refused for a reason that need not
// hold any more: what this node has not heard of may exist, be permitted, or be in use again.
func (rq *request) mayBeBehind(err error) bool {
	return atHand[rq.act] && !rq.caughtUp &&
		(errors.Is(err, kms.Denied) || errors.Is(err, kms.NotFound) || errors.Is(err, kms.Conflict))
}

// notSure is the error of a refusal that this node cannot stand by.
func notSure(refusal, cause error) error {
	return kms.Wrap(kms.Unavailable, cause, refusal.Error()+"; but this node reaches no leader that could say whether that is still so",
		"try again, or use another node")
}
