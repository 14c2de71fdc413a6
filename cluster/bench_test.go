package cluster_test

import (
	"sync/atomic"
	"testing"

	"github.com/conclave-kms/conclave/cluster/clustertest"
)

// BenchmarkPropose measures ticks through a cluster of three on loopback, each
// signed (ECDSA P-256) beforehand and durable on a majority when it is answered.
func BenchmarkPropose(b *testing.B) {
	c := clustertest.New(b, clustertest.Options{})
	at := map[string]int{"leader": c.Leader(), "follower": c.Follower()}
	for _, where := range []string{"leader", "follower"} {
		i := at[where]
		b.Run("one at a time at the "+where, func(b *testing.B) {
			raws := ticks(c, i, b.N)
			b.ResetTimer()
			for _, raw := range raws {
				c.Propose(i, raw)
			}
		})
		b.Run("64 at a time at the "+where, func(b *testing.B) {
			raws := ticks(c, i, b.N)
			var next atomic.Int64
			b.SetParallelism(32)
			b.ResetTimer()
			b.RunParallel(func(p *testing.PB) {
				for p.Next() {
					if _, err := c.Node(i).Propose(b.Context(), raws[next.Add(1)-1]); err != nil {
						b.Error(err)
					}
				}
			})
		})
	}
}

func ticks(c *clustertest.Cluster, i, n int) [][]byte {
	raws := make([][]byte, n)
	for k := range raws {
		raws[k] = c.Tick(i)
	}
	return raws
}
