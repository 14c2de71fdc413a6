package statetest

import (
	"context"
	"slices"

	"github.com/transparency-dev/merkle/rfc6962"

	"github.com/conclave-kms/conclave/kms/note"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/tlog"
	"github.com/conclave-kms/conclave/pqc"
)

// AccessLog is a log of which only the leaves' hashes are there: a tlog.Source for
// proofs.
type AccessLog struct{ hashes [][]byte }

// Add appends a leaf.
func (l *AccessLog) Add(leaf []byte) {
	l.hashes = append(l.hashes, rfc6962.DefaultHasher.HashLeaf(leaf))
}

// Fork returns a log with the first n leaves.
func (l *AccessLog) Fork(n int) *AccessLog { return &AccessLog{slices.Clone(l.hashes[:n])} }

// Size implements tlog.Source.
func (l *AccessLog) Size() uint64 { return uint64(len(l.hashes)) }

// Leaves implements tlog.Source; there are none.
func (l *AccessLog) Leaves(uint64, int) ([][]byte, error) { panic("statetest: a log of hashes alone") }

// Hashes implements tlog.Source.
func (l *AccessLog) Hashes(level uint, from, n uint64) ([][]byte, error) {
	width := uint64(1) << (8 * level)
	var out [][]byte
	for i := from; i < from+n; i++ {
		out = append(out, subtree(l.hashes[i*width:(i+1)*width]))
	}
	return out, nil
}

// subtree is the root of a complete subtree.
func subtree(hashes [][]byte) []byte {
	if len(hashes) == 1 {
		return slices.Clone(hashes[0])
	}
	half := len(hashes) / 2
	return rfc6962.DefaultHasher.HashChildren(subtree(hashes[:half]), subtree(hashes[half:]))
}

// WitnessKey returns the key by which a node cosigns. Each number is another key.
func (w *World) WitnessKey(node string, number uint32) *pqc.MLDSA44Key {
	w.t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.witnesses == nil {
		w.witnesses = make(map[string][]*pqc.MLDSA44Key)
	}
	for uint32(len(w.witnesses[node])) < number {
		seed, err := pqc.GenerateMLDSA44Seed(nil)
		if err != nil {
			w.t.Fatal(err)
		}
		key, err := pqc.NewMLDSA44Key(seed)
		seed.Destroy()
		if err != nil {
			w.t.Fatal(err)
		}
		w.witnesses[node] = append(w.witnesses[node], key)
	}
	return w.witnesses[node][number-1]
}

// AccessLog returns the access log of a node.
func (w *World) AccessLog(node string) *AccessLog {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.logs == nil {
		w.logs = make(map[string]*AccessLog)
	}
	if w.logs[node] == nil {
		w.logs[node] = &AccessLog{}
	}
	return w.logs[node]
}

// RegisterCommand returns the command by which a node registers its next witness key.
func (w *World) RegisterCommand(node string) state.RegisterWitness {
	w.t.Helper()
	old, _ := w.State().Witness(node)
	key := w.WitnessKey(node, old.Number+1)
	c := state.RegisterWitness{Number: old.Number + 1, PublicKey: key.PublicKey()}
	var err error
	if c.Possession, err = key.Sign(state.WitnessMessage(w.State().Cluster(), node, c.Number, c.PublicKey), []byte(state.WitnessContext)); err != nil {
		w.t.Fatal(err)
	}
	return c
}

// SignCheckpoint signs a checkpoint with both keys of a node.
func (w *World) SignCheckpoint(node string, c note.Checkpoint) note.Signature {
	w.t.Helper()
	n, witness := w.Node(node), note.KeyName(w.State().Cluster(), node)
	own, _ := w.State().Witness(node)
	s := note.Signature{Time: uint64(w.Now() / 1000)}
	digest, err := note.HardwareDigest(pqc.SuiteID(n.Record.SigningSuite), c)
	if err == nil {
		s.Hardware, err = n.Sign(context.Background(), digest)
	}
	if err == nil {
		s.MLDSA, err = w.WitnessKey(node, max(own.Number, 1)).Sign(note.CosignedMessage(witness, s.Time, c), nil)
	}
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

// CheckpointCommand returns the checkpoint of a log as a node's access log, with proofs
// from the last checkpoint and the sizes given, those that make sense.
func (w *World) CheckpointCommand(node string, log *AccessLog, from ...uint64) state.SubmitCheckpoint {
	w.t.Helper()
	last, _ := w.State().Checkpoint(node)
	size := log.Size()
	root, err := tlog.Root(log, size)
	if err != nil {
		w.t.Fatal(err)
	}
	c := state.SubmitCheckpoint{Restart: last.Restart, Size: size, Root: root}
	from = append(from, last.Size)
	slices.Sort(from)
	for _, m := range slices.Compact(from) {
		if m == 0 || m >= size {
			continue
		}
		p, err := tlog.Consistency(log, m, size)
		if err != nil {
			w.t.Fatal(err)
		}
		c.Proofs = append(c.Proofs, state.LogProof{From: m, Hashes: p})
	}
	return w.SignedCheckpoint(node, c)
}

// SignedCheckpoint returns the command with the signatures of a node.
func (w *World) SignedCheckpoint(node string, c state.SubmitCheckpoint) state.SubmitCheckpoint {
	w.t.Helper()
	c.Signature = w.SignCheckpoint(node, state.LogHead(w.State().Lineage(), note.AccessLog(node), c.Restart, c.Size, c.Root, nil))
	return c
}

// CosignCommand returns the cosignature of another node's last checkpoint, or, if owner
// is empty, of the cluster log.
func (w *World) CosignCommand(node, owner string) state.Cosign {
	w.t.Helper()
	s := w.State()
	if owner == "" {
		hash := s.Hash()
		return w.SignedCosign(node, state.Cosign{Log: note.ClusterLog, Size: s.LogSize(), Root: s.LogRoot(), State: hash[:]})
	}
	cp, _ := s.Checkpoint(owner)
	return w.SignedCosign(node, state.Cosign{Log: note.AccessLog(owner), Restart: cp.Restart, Size: cp.Size, Root: cp.Root})
}

// SignedCosign returns the command with the signatures of a node.
func (w *World) SignedCosign(node string, c state.Cosign) state.Cosign {
	w.t.Helper()
	c.Signature = w.SignCheckpoint(node, state.LogHead(w.State().Lineage(), c.Log, c.Restart, c.Size, c.Root, c.State))
	return c
}

// Grow adds n entries to a node's access log.
func (w *World) Grow(node string, n int) *AccessLog {
	l := w.AccessLog(node)
	for range n {
		l.Add(hash(node, l.Size()))
	}
	return l
}
