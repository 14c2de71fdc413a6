package parallel_test

import (
	"runtime"
	"sync/atomic"
	"testing"

	"github.com/conclave-kms/conclave/kms/parallel"
)

func TestDo(t *testing.T) {
	for _, n := range []int{0, 1, 2, 1000} {
		calls := make([]atomic.Int32, n)
		parallel.Do(n, func(i int) { calls[i].Add(1) })
		for i := range calls {
			if got := calls[i].Load(); got != 1 {
				t.Errorf("of %d: %d was done %d times", n, i, got)
			}
		}
	}
}

// TestAtOnce: two calls that wait for each other both end where there are two processors.
func TestAtOnce(t *testing.T) {
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(2))
	met := make(chan bool)
	parallel.Do(2, func(i int) {
		if i == 0 {
			met <- true
		} else {
			<-met
		}
	})
}
