package chaos

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/backup"
	product "github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/test/harness"
)

// entries reads a node's cluster log: no entry may be missing.
func entries(n *harness.Node) (list []audit.Record, err error) {
	err = audit.ReadCluster(filepath.Join(n.Data, "cluster-log"), func(rec audit.Record) error {
		rec.Raw, rec.Leaf = bytes.Clone(rec.Raw), bytes.Clone(rec.Leaf)
		list = append(list, rec)
		return nil
	}, func(g audit.Gap) error { return fmt.Errorf("%s lacks entries %d to %d", n.ID, g.From, g.To) })
	return list, err
}

// sameReplicas compares what all nodes have on disk, entry by entry with what each made
// of it, up to the end of the shortest log: the nodes sign their time to the last, and
// stop one after the other. Then it applies that from the genesis document on, with all
// signatures: every leaf must be what the command gives, and the state at the index of the hash
// that the nodes have named must have it. It returns how many entries that are, at least
// those of the size given.
func sameReplicas(c *harness.Coalition, size int, want stateHash) (n int, err error) {
	var first []audit.Record
	for i, node := range c.Nodes {
		list, err := entries(node)
		if err != nil {
			return 0, err
		}
		if i == 0 {
			first = list
		}
		first = first[:min(len(first), len(list))]
		for j, rec := range first {
			if rec.Index != list[j].Index || !bytes.Equal(rec.Raw, list[j].Raw) || !bytes.Equal(rec.Leaf, list[j].Leaf) {
				return 0, fmt.Errorf("entry %d of %s and of %s differ", rec.Index, node.ID, c.Nodes[0].ID)
			}
		}
	}
	if len(first) < size {
		return len(first), fmt.Errorf("a node has %d entries on disk; all had applied %d", len(first), size)
	}
	b, err := os.ReadFile(filepath.Join(c.Dir, "genesis.cbor"))
	if err != nil {
		return 0, err
	}
	signed, err := product.ParseSignedGenesis(b)
	if err != nil {
		return 0, err
	}
	st, err := product.New(signed)
	if err != nil {
		return 0, err
	}
	compared := false
	for _, rec := range first {
		var res product.Result
		if st, res = st.Apply(rec.Index, rec.Raw); !bytes.Equal(res.Leaf, rec.Leaf) {
			return 0, fmt.Errorf("entry %d: its leaf is not the one that the command gives", rec.Index)
		}
		if rec.Index == want.index {
			compared = true
			if hash := st.Hash(); string(hash[:]) != want.hash {
				return 0, fmt.Errorf("the nodes have a state at %d that is not what the log gives", rec.Index)
			}
		}
	}
	if !compared {
		return 0, fmt.Errorf("the log has no entry %d, at which the nodes' states were compared", want.index)
	}
	return len(first), nil
}

// stateHash is the hash of a state after the entry at an index.
type stateHash struct {
	index uint64
	hash  string
}

// sameState has every node write a backup of the state in its memory until all have done so at
// one and the same index, and compares the hashes. It returns the last that is common to all.
func sameState(ctx context.Context, c *harness.Coalition) (stateHash, error) {
	var mu sync.Mutex
	seen := map[uint64]map[string]string{} // index, node: hash
	var common stateHash
	err := harness.Within(ctx, 2*time.Minute, "backups of all nodes at one index", func(ctx context.Context) error {
		var g errgroup.Group
		for _, n := range c.Nodes {
			g.Go(func() error {
				s, err := backupOf(ctx, c, n)
				if err != nil {
					return fmt.Errorf("%s: %w", n.ID, err)
				}
				mu.Lock()
				defer mu.Unlock()
				if seen[s.index] == nil {
					seen[s.index] = map[string]string{}
				}
				seen[s.index][n.ID] = s.hash
				return nil
			})
		}
		if err := g.Wait(); err != nil {
			return err
		}
		for index, by := range seen {
			for node, h := range by {
				if h != by[slices.Min(slices.Collect(maps.Keys(by)))] {
					return harness.Give(fmt.Errorf("the state of %s at %d differs from the others'", node, index))
				}
				if len(by) == len(c.Nodes) && index > common.index {
					common = stateHash{index, h}
				}
			}
		}
		if common.index == 0 {
			return errors.New("they are at different indices")
		}
		return nil
	})
	return common, err
}

// backupOf returns the index and the hash of the state that a node puts into a backup.
func backupOf(ctx context.Context, c *harness.Coalition, n *harness.Node) (s stateHash, err error) {
	cl, err := c.Client(n, "operator", tryTimeout)
	if err != nil {
		return s, err
	}
	var b bytes.Buffer
	if err := cl.Backup(ctx, &b); err != nil {
		return s, err
	}
	sum, err := backup.Scan(&b)
	return stateHash{sum.Header.Index, string(sum.Hash)}, err
}
