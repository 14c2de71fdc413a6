package harness

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms/wire"
)

// TestCoalition founds five nodes at three sites, cuts the leader's words off in one
// direction, and sees the others go on.
func TestCoalition(t *testing.T) {
	if err := MissingTools(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	bin, remove, err := Find(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer remove()
	start := time.Now()
	c, err := Found(t.Context(), bin, t.TempDir(), Plan{Nodes: map[string]int{"fr": 2, "de": 2, "jp": 1}})
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
	t.Logf("five nodes after %v", time.Since(start).Round(time.Millisecond))
	leader, err := c.Leader(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	others := c.Except(leader)
	silent := c.Between([]*Node{leader}, others)
	c.Links.Cut(silent...)
	err = Within(t.Context(), time.Minute, "another leader", func(ctx context.Context) error {
		now, err := c.Leader(ctx)
		if err == nil && now == leader {
			err = context.DeadlineExceeded
		}
		return err
	})
	if err != nil {
		t.Fatal(err, c.Logs(10))
	}
	cl, err := c.Client(others[0], "operator", 20*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cl.CreateKeyring(t.Context(), wire.CreateKeyringRequest{Name: "ring", Residency: []string{"de", "fr", "jp"}, Policy: "keys"}); err != nil {
		t.Error(err)
	}
	c.Links.Heal(false, silent...)
	if _, err := c.SameLog(t.Context()); err != nil {
		t.Fatal(err, c.Logs(10))
	}
}
