package cluster_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/cluster/clustertest"
	"github.com/conclave-kms/conclave/kms"
)

// A node gives others what it keeps of the cluster log, or its reason not to.
func TestFetchRecords(t *testing.T) {
	c := clustertest.New(t, clustertest.Options{Config: func(i int, cfg *cluster.Config) {
		if i == 0 {
			return
		}
		cfg.Records = func(leaf uint64) ([]byte, error) {
			if leaf > 100 {
				return nil, kms.Errorf(kms.Invalid, "there is no leaf %d", leaf)
			}
			return fmt.Appendf(nil, "node %d from leaf %d on", i, leaf), nil
		}
	}})
	c.Leader()
	ctx, cancel := context.WithTimeout(t.Context(), clustertest.Patience)
	defer cancel()
	ask := func(of int, leaf uint64) ([]byte, error) { return c.Node(0).FetchRecords(ctx, c.Members[of].ID, leaf) }
	if b, err := ask(1, 7); err != nil || string(b) != "node 1 from leaf 7 on" {
		t.Errorf("%q, %v", b, err)
	}
	if _, err := ask(2, 101); !errors.Is(err, kms.Invalid) {
		t.Errorf("a leaf that is not there: %v", err)
	}
	if _, err := c.Node(1).FetchRecords(ctx, c.Members[0].ID, 7); !errors.Is(err, kms.Unavailable) {
		t.Errorf("a node that keeps none: %v", err)
	}
	if _, err := c.Node(0).FetchRecords(ctx, "nobody", 7); !errors.Is(err, kms.Unavailable) {
		t.Errorf("an unknown node: %v", err)
	}
}
