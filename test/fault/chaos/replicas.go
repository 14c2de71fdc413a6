package chaos

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"

	"github.com/conclave-kms/conclave/kms/audit"
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
// signatures: every leaf must be what the command gives. Equal commands in equal order
// give equal states, so this is done once. It returns how many entries that are, at
// least those of the size given, and the hash of the state.
func sameReplicas(c *harness.Coalition, size int) (n int, hash [32]byte, err error) {
	var first []audit.Record
	for i, node := range c.Nodes {
		list, err := entries(node)
		if err != nil {
			return 0, hash, err
		}
		if i == 0 {
			first = list
		}
		first = first[:min(len(first), len(list))]
		for j, rec := range first {
			if rec.Index != list[j].Index || !bytes.Equal(rec.Raw, list[j].Raw) || !bytes.Equal(rec.Leaf, list[j].Leaf) {
				return 0, hash, fmt.Errorf("entry %d of %s and of %s differ", rec.Index, node.ID, c.Nodes[0].ID)
			}
		}
	}
	if len(first) < size {
		return len(first), hash, fmt.Errorf("a node has %d entries on disk; all had applied %d", len(first), size)
	}
	b, err := os.ReadFile(filepath.Join(c.Dir, "genesis.cbor"))
	if err != nil {
		return 0, hash, err
	}
	signed, err := product.ParseSignedGenesis(b)
	if err != nil {
		return 0, hash, err
	}
	st, err := product.New(signed)
	if err != nil {
		return 0, hash, err
	}
	for _, rec := range first {
		var res product.Result
		if st, res = st.Apply(rec.Index, rec.Raw); !bytes.Equal(res.Leaf, rec.Leaf) {
			return 0, hash, fmt.Errorf("entry %d: its leaf is not the one that the command gives", rec.Index)
		}
	}
	return len(first), st.Hash(), nil
}
