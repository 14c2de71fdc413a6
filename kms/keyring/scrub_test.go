package keyring

import (
	"runtime"
	"testing"
	"testing/synctest"
	"time"
)

// TestScrub counts collections: a series after the first call, and another after
// calls in between.
func TestScrub(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		collections := func() uint32 {
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return m.NumForcedGC
		}
		var s scrubber
		before := collections()
		s.soon()
		s.soon()
		time.Sleep(scrubRounds*scrubEvery + time.Millisecond) // of the test's clock
		synctest.Wait()
		if n := collections() - before; n < scrubRounds {
			t.Errorf("%d collections, want %d", n, scrubRounds)
		}
		s.mu.Lock()
		if !s.running || s.again || s.rounds != scrubRounds {
			t.Errorf("the second call is forgotten: %d rounds to come", s.rounds)
		}
		s.mu.Unlock()
		time.Sleep(scrubRest + scrubRounds*scrubEvery)
		synctest.Wait()
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.running || s.rounds != 0 {
			t.Error("it does not come to rest")
		}
	})
}
