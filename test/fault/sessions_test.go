package fault

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
)

// TestSessionsLost takes the sessions away from fr's node, and then the whole
// library, again and again while clients have it use its device. They notice
// nothing: each call is made again on a new session.
func TestSessionsLost(t *testing.T) {
	w := cluster(t)
	for _, command := range []string{"closeall", "finalize"} {
		t.Run(command, func(t *testing.T) {
			w := &world{t, w.c, w.shim}
			stocks := w.stocks("fr")
			process := w.c.Nodes["fr"].Process()
			load := w.load(stocks)
			for range 4 {
				load.more(w)
				w.shim.begin(t, command)
				w.shim.carriedOut(t, command)
			}
			for _, s := range stocks {
				s.rotate()
			}
			load.more(w)
			load.end(w)
			w.recovered("fr", stocks)
			if node := w.c.Nodes["fr"].Process(); node != process || !node.Running() {
				t.Error("the node is another process than before")
			}
		})
	}
}

// load is clients that make keys at fr's node, which draws random bytes, opens
// KEKs and signs commands with its device, and that use keys.
type load struct {
	stop    context.CancelFunc
	wg      sync.WaitGroup
	done    atomic.Int64
	failure atomic.Pointer[error]
}

func (w *world) load(stocks []*stock) *load {
	w.t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{stop: cancel}
	w.t.Cleanup(func() { cancel(); l.wg.Wait() })
	operator, service := w.client("fr", "operator"), w.client("fr", "service")
	for _, s := range stocks {
		for range 3 {
			l.run(ctx, func() error {
				_, err := operator.CreateKey(ctx, s.cold, wire.CreateKeyRequest{Name: unique("load"), Purpose: string(kms.Encrypt)})
				return err
			})
			l.run(ctx, func() error {
				_, err := service.Key(s.cold, "signer").Sign(ctx, wire.SignRequest{Message: []byte("load")})
				return err
			})
			l.run(ctx, func() error { return s.tryDecrypt(ctx, "fr", s.cold, "data", s.before[s.cold]) })
		}
	}
	return l
}

func (l *load) run(ctx context.Context, call func() error) {
	l.wg.Go(func() {
		for ctx.Err() == nil {
			if err := call(); err != nil && ctx.Err() == nil {
				l.failure.CompareAndSwap(nil, &err)
				return
			}
			l.done.Add(1)
		}
	})
}

// more waits until the load has made some calls more.
func (l *load) more(w *world) {
	w.t.Helper()
	from := l.done.Load()
	w.eventually(recovery, "the load goes on", func(context.Context) error {
		if l.failure.Load() == nil && l.done.Load() < from+30 {
			return errors.New("too few calls came back")
		}
		return nil
	})
}

func (l *load) end(w *world) {
	w.t.Helper()
	l.stop()
	l.wg.Wait()
	if err := l.failure.Load(); err != nil {
		w.t.Errorf("a call failed: %v", *err)
	}
	w.t.Logf("%d calls", l.done.Load())
}
