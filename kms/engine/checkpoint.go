package engine

import (
	"bytes"
	"context"
	"slices"
	"time"

	"github.com/conclave-kms/conclave/kms"
	cosigned "github.com/conclave-kms/conclave/kms/note"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/tlog"
)

// checkpointLeaves is the growth of the access log that gets a checkpoint at once.
const checkpointLeaves = 10_000

// CheckpointKey is the ML-DSA-44 key of a node.
type CheckpointKey interface {
	PublicKey() []byte
	Sign(message, context []byte) ([]byte, error)
}

// Seen remembers durably, apart from the replicated state, what a node has cosigned: so
// a node notices when the cluster, or a log, goes on from before.
type Seen interface {
	// Get returns the head of the log with an origin that was put last, size 0 for none.
	Get(origin string) (size uint64, root []byte, err error)
	// Put returns when the head is durable.
	Put(origin string, size uint64, root []byte) error
}

// Checkpoints is what a node takes part in checkpoints with.
type Checkpoints struct {
	Key     CheckpointKey
	Seen    Seen
	Access  tlog.Source // the durable access log
	Cluster tlog.Source // the cluster log, which need not have all hashes
	Marks   *Marks
}

var checkpointKinds = []state.CommandKind{
	{Type: state.TypeRegisterWitness, Version: state.CommandVersion},
	{Type: state.TypeSubmitCheckpoint, Version: state.CommandVersion},
	{Type: state.TypeCosign, Version: state.CommandVersion},
}

// checkpoints does what is due about checkpoints: has the cluster know this node's key,
// submits the access log's, cosigns those of other sites and the cluster log.
func (a *Agent) checkpoints(ctx context.Context, st *state.State) time.Duration {
	c := a.e.cfg.Checkpoints
	n, ok := st.Node(a.e.node)
	if c == nil || !ok || n.Root == 0 || !bytes.Equal(n.Agreement, a.e.agreement) ||
		slices.ContainsFunc(checkpointKinds, func(k state.CommandKind) bool { return len(st.Lacking(k)) > 0 }) {
		return idleWait
	}
	if w, ok := st.Witness(n.ID); !ok || !bytes.Equal(w.PublicKey, c.Key.PublicKey()) {
		return a.attempt(ctx, "witness", "witness", 0, func(ctx context.Context) error { return a.registerWitness(ctx, st) })
	}
	a.e.lags.observe(a.e, st)
	return min(a.submitCheckpoint(ctx, st), a.cosignOthers(ctx, st, n), a.cosignCluster(ctx, st, n))
}

func (a *Agent) registerWitness(ctx context.Context, st *state.State) error {
	key := a.e.cfg.Checkpoints.Key
	old, _ := st.Witness(a.e.node)
	cmd := state.RegisterWitness{Number: old.Number + 1, PublicKey: key.PublicKey()}
	var err error
	if cmd.Possession, err = key.Sign(state.WitnessMessage(st.Cluster(), a.e.node, cmd.Number, cmd.PublicKey), []byte(state.WitnessContext)); err != nil {
		return err
	}
	_, err = a.e.submit(ctx, attempt{}, cmd)
	return err
}

// signHead signs a log's head with both keys of this node.
func (e *Engine) signHead(ctx context.Context, st *state.State, c cosigned.Checkpoint) (s cosigned.Signature, err error) {
	digest, err := cosigned.HardwareDigest(e.signingSuite(st), c)
	if err != nil {
		return s, err
	}
	if s.Hardware, err = e.cfg.Signer.Sign(ctx, digest); err != nil {
		return s, kms.Wrap(kms.Unavailable, err, "the node's device did not sign the checkpoint", deviceFix)
	}
	s.Time = uint64(e.now().Unix())
	s.MLDSA, err = e.cfg.Checkpoints.Key.Sign(cosigned.CosignedMessage(cosigned.KeyName(st.Cluster(), e.node), s.Time, c), nil)
	return s, err
}

// submitCheckpoint submits the access log's checkpoint when it is due.
func (a *Agent) submitCheckpoint(ctx context.Context, st *state.State) time.Duration {
	log := a.e.cfg.Checkpoints.Access
	last, _ := st.Checkpoint(a.e.node)
	size, restart := log.Size(), last.Restart
	if a.lostInRecovery(st, last) {
		last, restart = state.Checkpoint{}, restart+1
	}
	behind := a.behind(st, last)
	switch {
	case last.Fork != nil: // nothing helps, the alarms say so
		return idleWait
	case size == 0 || size == last.Size && len(behind) == 0:
		return idleWait
	case size < last.Size+checkpointLeaves:
		if wait := checkpointEvery - a.e.now().Sub(a.submitted); wait > 0 {
			return wait
		}
	}
	return a.attempt(ctx, "checkpoint", "checkpoint", 0, func(ctx context.Context) error {
		err := a.submitHead(ctx, st, restart, size, append(behind, last.Size))
		if err == nil || kms.KindOf(err) == kms.Exists {
			a.submitted = a.e.now()
		}
		return err
	})
}

// lostInRecovery reports whether the access log begins anew: the node has come back
// from a backup, without the log that it had.
func (a *Agent) lostInRecovery(st *state.State, last state.Checkpoint) bool {
	began, ok := st.Recovered()
	if !ok || last.Size == 0 || last.Index >= began.Index {
		return false
	}
	root, err := tlog.Root(a.e.cfg.Checkpoints.Access, last.Size)
	return last.Fork != nil || err != nil || !bytes.Equal(root, last.Root)
}

// behind lists the sizes at which cosigners of other sites stand that have spoken since the
// last checkpoint and are before it: they want a proof from there.
func (a *Agent) behind(st *state.State, last state.Checkpoint) (sizes []uint64) {
	for _, c := range st.Cosignatures(cosigned.AccessLog(a.e.node)) {
		if c.Index > last.Index && c.Restart == last.Restart && c.Size < last.Size {
			sizes = append(sizes, c.Size)
		}
	}
	return sizes
}

// submitHead submits the checkpoint of a size with proofs from the sizes given and from
// wherever cosigners stand. A log that is shorter than it was goes without: then the
// cluster keeps it as evidence.
func (a *Agent) submitHead(ctx context.Context, st *state.State, restart uint32, size uint64, from []uint64) error {
	log := a.e.cfg.Checkpoints.Access
	cmd := state.SubmitCheckpoint{Restart: restart, Size: size}
	var err error
	if cmd.Root, err = tlog.Root(log, size); err != nil {
		return err
	}
	for _, c := range st.Cosignatures(cosigned.AccessLog(a.e.node)) {
		if c.Restart == restart {
			from = append(from, c.Size)
		}
	}
	slices.Sort(from)
	for _, m := range slices.Compact(from) {
		if m == 0 || m >= size {
			continue
		}
		p, err := tlog.Consistency(log, m, size)
		if err != nil {
			return err
		}
		cmd.Proofs = append(cmd.Proofs, state.LogProof{From: m, Hashes: p})
	}
	if cmd.Signature, err = a.e.signHead(ctx, st, state.LogHead(st.Lineage(), cosigned.AccessLog(a.e.node), cmd.Restart, cmd.Size, cmd.Root, nil)); err != nil {
		return err
	}
	_, err = a.e.submit(ctx, attempt{}, cmd)
	return err
}

func parseStatement(raw []byte) (state.Envelope, state.Command, error) {
	b, _, err := state.Split(raw)
	if err != nil {
		return state.Envelope{}, nil, err
	}
	return state.ParseEnvelope(b)
}
