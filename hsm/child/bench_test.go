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

type macFunc = func(ctx context.Context, message []byte) ([]byte, error)

// BenchmarkIsolation compares the rate of MACs of 100 bytes, what a message of format
// 1 needs of the device, in this process and through a child process, at several
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
	for _, callers := range []int{1, 4, 16, 64} {
		b.Run(fmt.Sprint(callers), func(b *testing.B) {
			var in, out, cost []float64
			for b.Loop() {
				x, y := rate(b, here, callers), rate(b, there, callers)
				in, out, cost = append(in, x), append(out, y), append(cost, 100*(1-y/x))
			}
			b.ReportMetric(median(in), "in-process/s")
			b.ReportMetric(median(out), "child/s")
			b.ReportMetric(median(cost), "cost-%")
			b.ReportMetric(0, "ns/op")
		})
	}
}

func median(all []float64) float64 {
	slices.Sort(all)
	return all[len(all)/2]
}

// rate is how many MACs a second so many callers get in a short span.
func rate(b *testing.B, mac macFunc, callers int) float64 {
	const span = 100 * time.Millisecond
	message := make([]byte, 100)
	var n atomic.Int64
	var wg sync.WaitGroup
	begin := time.Now()
	for range callers {
		wg.Go(func() {
			for time.Since(begin) < span {
				if _, err := mac(context.Background(), message); err != nil {
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
