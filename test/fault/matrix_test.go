package fault

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms/wire"
)

// effect is what a fault does to the node.
type effect int

const (
	unready  effect = iota // it lives and says that it is not ready
	dead                   // its process ends
	harmless               // none
)

// fault is what happens to the device of one node while all three run.
type fault struct {
	name   string
	victim string // site
	effect effect
	strike func(w *world)
	repair func(w *world)
	// One of these words must be in what readiness, clients and the log of the node say.
	ready, api, log []string
}

// TestFaults breaks one device after the other under the running cluster.
func TestFaults(t *testing.T) {
	for _, f := range faults {
		t.Run(f.name, func(t *testing.T) { f.run(cluster(t)) })
	}
}

func (f fault) run(w *world) {
	stocks := w.stocks(f.victim)
	node := w.c.Nodes[f.victim]
	mark := w.mark(f.victim)
	repaired := false
	repair := func() {
		repaired = true
		f.repair(w)
		if f.effect == dead {
			w.do(node.Launch())
		}
	}
	w.t.Cleanup(func() {
		if !repaired {
			repair()
		}
	})
	f.strike(w)
	switch f.effect {
	case unready:
		w.unready(f.victim, f.ready)
	case dead:
		w.do(node.Process().Ended(w.t.Context()))
	}
	for _, s := range stocks {
		s.rotate()
		if f.effect != harmless {
			s.refuses(f.api, f.effect == unready)
		}
	}
	for _, s := range stocks {
		s.othersServe()
		if f.effect == harmless {
			s.whole(recovery)
			s.intact()
		} else {
			s.halfWay()
		}
	}
	if f.effect != harmless {
		mustName(w.t, "the log of "+f.victim, w.since(f.victim, mark), f.log)
	}
	process := node.Process()
	repair()
	w.recovered(f.victim, stocks)
	if f.effect != dead && (node.Process() != process || !process.Running()) {
		w.t.Errorf("%s is another process than before the fault", f.victim)
	}
}

// unready waits until the node says that it is not ready, and why.
func (w *world) unready(site string, words []string) {
	w.t.Helper()
	var said []string
	w.eventually(15*time.Second, "readiness of "+site+" tells of the fault", func(ctx context.Context) error {
		r, err := w.ready(ctx, site)
		if said = r.Reasons; len(said) > 0 {
			return nil
		}
		return errors.Join(errors.New("it gives no reason"), err)
	})
	mustName(w.t, "readiness of "+site, strings.Join(said, "; "), words)
}

func (w *world) ready(ctx context.Context, site string) (wire.Ready, error) {
	cl, err := w.c.Client(site, "operator")
	if err != nil {
		return wire.Ready{}, err
	}
	return cl.Ready(ctx)
}

// recovered wants the node back to work within the time promised, in the same
// process, with nothing lost.
func (w *world) recovered(site string, stocks []*stock) {
	w.t.Helper()
	end := time.Now().Add(recovery)
	w.eventually(time.Until(end), site+" is ready again", func(ctx context.Context) error {
		r, err := w.ready(ctx, site)
		if err == nil && !r.Ready {
			err = errors.New(strings.Join(r.Reasons, "; "))
		}
		return err
	})
	for _, s := range stocks {
		w.eventually(time.Until(end), site+" opens keys with its device again", func(ctx context.Context) error {
			return errors.Join(s.tryDecrypt(ctx, site, s.cold, "data", s.before[s.cold]), s.trySign(ctx, site, s.cold))
		})
		s.whole(time.Until(end))
		s.intact()
	}
	w.t.Logf("%s recovered within %v", site, time.Until(end.Add(-recovery)).Abs().Round(100*time.Millisecond))
}
