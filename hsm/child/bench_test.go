package child_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/hsm/hsmtest"
)

// BenchmarkIsolation compares the rate of MACs of 100 bytes, what a message of format
// 1 needs of the device, and of ECDH on P-384, in this process and through a child process, at several
// numbers of callers. The two take turns in short spans, so that what else the
// machine does hits both; the medians are reported. Run it with -benchtime 30x.
func BenchmarkIsolation(b *testing.B) {
	tok := hsmtest.New(b)
	tok.Provision(b, tok.Config())
	inside := tok.Open(b, tok.Config())
	outside, _ := open(b, tok.Config())
	blob, _ := hmacKey(b, outside)
	ctx := context.Background()
	here, unloadHere, err := inside.LoadHMAC(ctx, blob)
	if err != nil {
		b.Fatal(err)
	}
	defer unloadHere()
	there, unloadThere, err := outside.LoadHMAC(ctx, blob)
	if err != nil {
		b.Fatal(err)
	}
	defer unloadThere()
	message := make([]byte, 100)
	for _, x := range []struct {
		name      string
		here, out func() error
	}{
		{"MAC", func() error { _, err := here(ctx, message); return err }, func() error { _, err := there(ctx, message); return err }},
		{"ECDH", func() error { _, err := inside.ECDH(ctx, inside.AgreementKey()); return err }, func() error { _, err := outside.ECDH(ctx, inside.AgreementKey()); return err }},
	} {
		for _, callers := range []int{1, 4, 16, 64} {
			b.Run(fmt.Sprint(x.name, "/", callers), func(b *testing.B) {
				var in, out, cost []float64
				for b.Loop() {
					i, o := rate(b, x.here, callers), rate(b, x.out, callers)
					in, out, cost = append(in, i), append(out, o), append(cost, 100*(1-o/i))
				}
				b.ReportMetric(median(in), "in-process/s")
				b.ReportMetric(median(out), "child/s")
				b.ReportMetric(median(cost), "cost-%")
				b.ReportMetric(0, "ns/op")
			})
		}
	}
}

func median(all []float64) float64 {
	slices.Sort(all)
	return all[len(all)/2]
}

// rate is how many calls a second so many callers get in a short span.
func rate(b *testing.B, f func() error, callers int) float64 {
	const span = 100 * time.Millisecond
	var n atomic.Int64
	var wg sync.WaitGroup
	begin := time.Now()
	for range callers {
		wg.Go(func() {
			for time.Since(begin) < span {
				if err := f(); err != nil {
					b.Error(err)
					return
				}
				n.Add(1)
			}
		})
	}
	wg.Wait()
	return float64(n.Load()) / time.Since(begin).Seconds()
}

// BenchmarkOpen is what a start, or a start again, costs.
func BenchmarkOpen(b *testing.B) {
	tok := hsmtest.New(b)
	tok.Provision(b, tok.Config())
	for name, run := range map[string]func() (interface{ Close() error }, error){
		"in-process": func() (interface{ Close() error }, error) { return hsm.Open(context.Background(), tok.Config()) },
		"child":      func() (interface{ Close() error }, error) { return openChild(tok.Config()) },
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				d, err := run()
				if err != nil {
					b.Fatal(err)
				}
				if err := d.Close(); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
