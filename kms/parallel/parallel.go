// Package parallel spreads work over processors.
package parallel

import (
	"runtime"
	"sync"
	"sync/atomic"
)

// Do calls f(0) to f(n-1) on as many goroutines as there are processors and returns when
// all have ended. The calls must not depend on one another.
func Do(n int, f func(i int)) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(n, runtime.GOMAXPROCS(0)) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				f(i)
			}
		})
	}
	wg.Wait()
}
