package cluster

import (
	"bufio"
	"context"
	"errors"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// Limits of the accepting side of the forward protocol.
const (
	maxRequestsPerConn = 256
	maxRequestTime     = time.Minute
)

// answerer carries out one request of a peer.
type answerer interface {
	answer(ctx context.Context, peer string, req request) response
}

// serveForward serves a forward connection until it ends and waits for the
// requests under way.
func serveForward(base context.Context, conn *nodeConn, g greeting, a answerer) {
	ctx, cancel := context.WithCancel(base)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	defer conn.Close()

	var write sync.Mutex
	send := func(v any) {
		write.Lock()
		defer write.Unlock()
		_ = conn.SetWriteDeadline(time.Now().Add(writeTimeout))
		if err := writeFrame(conn, v); err != nil {
			_ = conn.Close() // wakes the reader below
		}
	}
	send(g)
	slots := make(chan struct{}, maxRequestsPerConn)
	r := bufio.NewReader(conn)
	for {
		var req request
		if err := readFrame(r, maxRequest, &req); err != nil {
			return
		}
		select {
		case slots <- struct{}{}:
		case <-ctx.Done():
			return
		}
		wg.Go(func() {
			defer func() { <-slots }()
			ctx, done := context.WithTimeout(ctx, req.limit())
			defer done()
			resp := a.answer(ctx, conn.peer, req)
			resp.ID = req.ID
			send(resp)
		})
	}
}

// errorResponse carries an error to the caller without its cause.
func errorResponse(err error) response {
	r := response{Status: statusError, Kind: uint8(kms.KindOf(err)), Message: "internal error at the leader"}
	var e *kms.Error
	if errors.As(err, &e) {
		r.Message, r.Fix = e.Msg, e.Fix
	}
	return r
}

// err returns the error that a response carries, nil for statusOK.
func (r response) err() error {
	switch r.Status {
	case statusOK:
		return nil
	case statusNotLeader:
		return errNotAppended
	case statusError:
		return &kms.Error{Kind: kms.Kind(r.Kind), Msg: r.Message, Fix: r.Fix}
	}
	return kms.Errorf(kms.Internal, "a node answered with unknown status %d", r.Status)
}
