package chaos

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"

	"github.com/conclave-kms/conclave/kms/audit"
	product "github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/test/harness"
)

// replica is what a node has on disk, applied anew from the genesis document on.
type replica struct {
	state   *product.State
	entries int
}

// errEnough ends a replay.
var errEnough = errors.New("enough")

// replay reads at most so many entries of a node's cluster log and verifies them: every
// leaf is what applying the command gives, and no entry is missing.
func replay(c *harness.Coalition, n *harness.Node, most int) (replica, error) {
	b, err := os.ReadFile(filepath.Join(c.Dir, "genesis.cbor"))
	if err != nil {
		return replica{}, err
	}
	signed, err := product.ParseSignedGenesis(b)
	if err != nil {
		return replica{}, err
	}
	var r replica
	if r.state, err = product.New(signed); err != nil {
		return r, err
	}
	err = audit.ReadCluster(filepath.Join(n.Data, "cluster-log"), func(rec audit.Record) error {
		if r.entries == most {
			return errEnough
		}
		var res product.Result
		r.state, res = r.state.Apply(rec.Index, rec.Raw)
		r.entries++
		if !bytes.Equal(res.Leaf, rec.Leaf) {
			return fmt.Errorf("entry %d: its leaf is not the one that the command gives", rec.Index)
		}
		return nil
	}, func(g audit.Gap) error { return fmt.Errorf("entries %d to %d are missing", g.From, g.To) })
	if errors.Is(err, errEnough) {
		err = nil
	}
	return r, err
}

// sameReplicas compares what all nodes have on disk, up to the end of the shortest log:
// the nodes sign their time to the last, and stop one after the other. It returns how
// many entries that are, at least those of the size given.
func sameReplicas(c *harness.Coalition, size int) (entries int, err error) {
	entries = math.MaxInt
	for _, n := range c.Nodes {
		r, err := replay(c, n, math.MaxInt)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", n.ID, err)
		}
		entries = min(entries, r.entries)
	}
	if entries < size {
		return entries, fmt.Errorf("a node has %d entries on disk; all had applied %d", entries, size)
	}
	var hash [32]byte
	var root []byte
	for i, n := range c.Nodes {
		r, err := replay(c, n, entries)
		if err != nil {
			return 0, fmt.Errorf("%s: %w", n.ID, err)
		}
		if i == 0 {
			hash, root = r.state.Hash(), r.state.LogRoot()
		}
		if r.state.Hash() != hash || !bytes.Equal(r.state.LogRoot(), root) {
			return 0, fmt.Errorf("after %d entries the states or logs of %s and %s differ", entries, n.ID, c.Nodes[0].ID)
		}
	}
	return entries, nil
}
