package state_test

import (
	"fmt"
	"runtime"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// BenchmarkRotateKEK rotates the KEK of a keyring with 100,000 keys: what one replica
// does for each batch, and for all of them. Run it with -benchtime 1x.
func BenchmarkRotateKEK(b *testing.B) {
	const keys = 100_000
	w := statetest.New(b, statetest.Options{})
	w.Announce()
	w.CreateKeyring("ring", "fr", "de", "jp")
	w.GiveReceipts()
	for i := range keys {
		w.CreateKey("ring", fmt.Sprintf("k-%06d", i), kms.Encrypt)
	}
	w.CommitKEK(w.ProposeKEK("ring"))
	w.GiveReceipts()
	begin := w.State()
	for b.Loop() {
		w.SetState(begin)
		var rewrap, confirm, complete, progress time.Duration
		var before, after runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&before)
		timed := func(d *time.Duration, node string, c state.Command) state.Result {
			raw := w.Command(node, c)
			at := time.Now()
			r := w.Apply(raw)
			if *d += time.Since(at); r.Err() != nil {
				b.Fatal(r.Err())
			}
			return r
		}
		batches := 0
		for ; ; batches++ {
			c := w.RewrapCommand("node-fr-1", "ring", state.MaxRewrap)
			if len(c.Items) == 0 {
				break
			}
			r := timed(&rewrap, "node-fr-1", c)
			batch, _ := w.State().Batch("ring", 2, r.Index)
			timed(&confirm, "node-fr-1", statetest.ConfirmRewrapCommand(batch))
			timed(&confirm, "node-de-1", statetest.ConfirmRewrapCommand(batch))
			timed(&complete, "node-jp-1", statetest.ConfirmRewrapCommand(batch))
		}
		at := time.Now()
		if p, _ := w.State().KEKProgress("ring"); p.Done != keys {
			b.Fatalf("%+v", p)
		}
		progress = time.Since(at)
		at = time.Now()
		w.Retire("ring")
		retire := time.Since(at)
		runtime.GC()
		runtime.ReadMemStats(&after)
		each := func(d time.Duration, n int) float64 { return float64(d.Microseconds()) / float64(n) / 1000 }
		b.ReportMetric(float64(batches), "batches")
		b.ReportMetric(each(rewrap, batches), "ms/rewrap")
		b.ReportMetric(each(confirm, 2*batches), "ms/confirm")
		b.ReportMetric(each(complete, batches), "ms/last-confirm")
		b.ReportMetric(each(retire, 1), "ms/retire")
		b.ReportMetric(each(progress, 1), "ms/progress")
		b.ReportMetric(float64(int64(after.HeapAlloc)-int64(before.HeapAlloc))/(1<<20), "MiB-more")
	}
}
