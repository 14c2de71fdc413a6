package fault

import (
	"context"
	"fmt"
	"testing"

	"github.com/conclave-kms/conclave/test/harness"
)

// TestFaultsIsolated has fr's library in a process of its own, which crashes,
// hangs, is killed and is frozen. The node survives all of it.
func TestFaultsIsolated(t *testing.T) {
	w := cluster(t)
	fr := w.c.Nodes["fr"]
	restore := w.configure(fr, map[string]any{"device.isolate": true})
	t.Cleanup(func() {
		w.shim.end(t, "hang")
		restore()
		w.do(fr.Restart(context.Background()))
	})
	w.do(fr.Restart(t.Context()))
	for _, f := range []fault{
		{
			name: "the library's process crashes", victim: "fr", effect: harmless, // it is started again at once
			strike: func(w *world) { w.shim.begin(w.t, "crash"); w.shim.carriedOut(w.t, "crash") },
			repair: func(*world) {},
		},
		{
			name: "the library's process is killed", victim: "fr", effect: harmless,
			strike: func(w *world) { w.do(w.library().Kill(context.Background())) },
			repair: func(*world) {},
		},
		{
			name: "the library's process is frozen", victim: "fr", effect: harmless,
			strike: func(w *world) {
				p := w.library()
				w.do(p.Pause(context.Background()))
				w.do(p.Ended(w.t.Context())) // the node kills it when a call is overdue
			},
			repair: func(*world) {},
		},
		{
			name: "the isolated library hangs", victim: "fr",
			strike: func(w *world) { w.shim.begin(w.t, "hang") },
			repair: func(w *world) { w.shim.end(w.t, "hang") },
			ready:  []string{"hung", "no answer"}, api: []string{"device"}, log: []string{"hung", "no answer"},
		},
	} {
		t.Run(f.name, func(t *testing.T) { f.run(&world{t, w.c, w.shim}) })
	}
}

// library returns the process in which fr's library runs.
func (w *world) library() (p harness.Process) {
	w.t.Helper()
	w.eventually(recovery, "fr's node has a process for its library", func(context.Context) error {
		children, err := w.c.Nodes["fr"].Children()
		if err == nil && len(children) != 1 {
			err = fmt.Errorf("it has %d children", len(children))
		}
		if err == nil {
			p = children[0]
		}
		return err
	})
	return p
}
