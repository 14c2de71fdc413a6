package chaos

import (
	"context"
	"strings"
	"testing"
	"time"
)

// TestRotations rotates keys under faults. No client at any site fails to open anything at
// any time, and the evidence of every rotation verifies.
func TestRotations(t *testing.T) {
	bin := need(t)
	seed := number(t, seedEnv, uint64(time.Now().UnixNano()))
	want := int(number(t, turnsEnv, 6))
	t.Logf("seed %d (%s), %d rotations (%s)", seed, seedEnv, want, turnsEnv)
	r := found(t, bin, seed)
	s, err := NewRotations(t.Context(), r.c, want)
	if err != nil {
		t.Fatal(err, r.c.Logs(10))
	}
	defer s.Close()
	begin := time.Now()
	faults := r.newFaults(t, func() time.Duration { return time.Since(begin) }, seed)
	ctx, cancel := context.WithCancel(t.Context())
	injecting := make(chan struct{})
	go func() {
		defer close(injecting)
		faults.Run(ctx, 1500*ms)
	}()
	s.Run(t.Context(), seed)
	took := time.Since(begin)
	cancel()
	<-injecting
	if err := faults.Heal(t.Context()); err != nil {
		t.Error(err)
	}
	everywhere := s.Everywhere(t.Context())
	if _, err := r.c.SameLog(t.Context()); err != nil {
		t.Error(err)
	}
	r.trusted(t)
	for _, x := range append(s.failed, faults.failures...) {
		t.Error(x)
	}
	kinds, total := faults.counts()
	t.Logf("%d rotations in %v, the evidence of each verified; %d faults: %v", s.done, took.Round(time.Second), total, kinds)
	t.Logf("opened by clients of the sites: %v, %d calls repeated, the slowest took %v; afterwards %d times, every version at every node; %d failures", s.opened, s.again, s.slowest.Round(ms), everywhere, len(s.failed))
	for reason, n := range faults.endings() {
		t.Logf("ended by itself, %d times: %s", n, strings.TrimSpace(reason))
	}
	if s.done != want || total == 0 || everywhere < len(r.c.Nodes)*(want+storyKeys) {
		t.Errorf("%d of %d rotations, %d faults: something was not tried", s.done, want, total)
	}
	if t.Failed() {
		t.Log(r.c.Logs(100))
	}
}
