package chaos

import (
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

const heartbeat = time.Second // the default of [cluster] heartbeat

// TestFailover kills the leader of three nodes on loopback again and again, while a
// client with retries writes. The time from the kill to the first answer to a write
// that was asked for after it stays within three heartbeat timeouts, and the client
// sees no errors but of kinds that say: try again.
func TestFailover(t *testing.T) {
	bin := need(t)
	kills := number(t, killsEnv, 8)
	c, err := harness.Found(t.Context(), bin.Binaries, t.TempDir(), harness.Plan{
		Nodes: map[string]int{"fr": 1, "de": 1, "jp": 1}, Cluster: map[string]any{"heartbeat": heartbeat.String()}, Direct: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	}()
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err, c.Logs(10))
	}
	cl := retrying(t, c)
	_, err = cl.CreateKeyring(t.Context(), wire.CreateKeyringRequest{Name: ring, Residency: []string{"de", "fr", "jp"}, Policy: "keys"})
	if err != nil {
		t.Fatal(err)
	}
	var took []time.Duration
	var seen errorCounts
	for i := range kills {
		leader, err := c.Leader(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		took = append(took, replaced(t, c, leader, cl, i, &seen))
		if err := c.Launch(leader); err != nil {
			t.Fatal(err)
		}
		if err := leader.Ready(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for _, x := range seen.unexplained() {
		t.Error(x)
	}
	for _, k := range answers {
		if n := seen.kind[k.String()]; n > 0 {
			t.Errorf("%d writes of new keys were answered %v", n, k)
		}
	}
	slices.Sort(took)
	p99 := quantile(took, 0.99)
	t.Logf("%d kills of the leader: failover p50 %v, p99 %v, heartbeat timeout %v; the client's calls: %v",
		kills, quantile(took, 0.5).Round(ms), p99.Round(ms), heartbeat, &seen)
	if p99 > 3*heartbeat {
		t.Errorf("failover takes %v (p99); three heartbeat timeouts are %v; all: %v", p99.Round(ms), 3*heartbeat, took)
	}
}

// replaced kills the leader and returns how long it was until a write was answered.
func replaced(t *testing.T, c *harness.Coalition, leader *harness.Node, cl *client.Client, kill uint64, seen *errorCounts) time.Duration {
	t.Helper()
	begin := time.Now()
	if err := leader.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	for n := 0; ; n++ {
		_, err := cl.CreateKey(t.Context(), ring, wire.CreateKeyRequest{Name: fmt.Sprintf("k%d-%d", kill, n), Purpose: string(kms.Encrypt)})
		seen.count("the client", time.Since(begin), err)
		if err == nil {
			return time.Since(begin)
		}
		if time.Since(begin) > time.Minute {
			t.Fatal(err, c.Logs(20))
		}
	}
}

// retrying returns an operator's client that tries all nodes, as a careful caller's does.
func retrying(t *testing.T, c *harness.Coalition) *client.Client {
	t.Helper()
	cfg, err := c.Config("fr", "operator", c.Nodes...)
	if err != nil {
		t.Fatal(err)
	}
	cl, err := client.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(cl.Close)
	return cl
}
