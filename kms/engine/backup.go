package engine

import (
	"bytes"
	"context"
	"io"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/backup"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// Backup is a backup that the caller may have: the state as it was when it was
// asked for.
type Backup struct {
	e  *Engine
	st *state.State
}

// Backup permits or denies a backup of the cluster's state, of wrapped material
// only, and logs it. Errors: kms.Denied; kms.Conflict while this node's device is not
// the one that the cluster knows, since it signs the backup.
func (e *Engine) Backup(ctx context.Context, c Caller) (*Backup, error) {
	return read(ctx, e, c, ActCreateBackup, resource{}, "backup", func(st *state.State) (*Backup, error) {
		n, ok := st.Node(e.node)
		if !ok || !bytes.Equal(n.Agreement, e.agreement) {
			return nil, kms.Errorf(kms.Conflict, "the hardware root of node %s is being replaced; ask another node for the backup", e.node)
		}
		return &Backup{e, st}, nil
	})
}

// Write writes the file (package backup), signed by the node's device. A file that
// is cut short has no trailer and is refused by whoever reads it.
func (b *Backup) Write(ctx context.Context, w io.Writer) error {
	_, err := backup.Write(ctx, w, b.st, b.e.node, b.e.cfg.Version, b.e.now(), b.e.cfg.Signer.Sign)
	return err
}

// Recoveries lists the beginnings of epochs, the first one first.
func (e *Engine) Recoveries(ctx context.Context, c Caller) (wire.Recoveries, error) {
	return read(ctx, e, c, ActReadCluster, resource{}, "recoveries", func(st *state.State) (wire.Recoveries, error) {
		l := wire.Recoveries{Recoveries: []wire.Recovery{}}
		for _, r := range st.Recoveries() {
			v, err := recoveryView(st, r)
			if err != nil {
				return l, err
			}
			l.Recoveries = append(l.Recoveries, v)
		}
		return l, nil
	})
}

func recoveryView(st *state.State, r state.Recovery) (wire.Recovery, error) {
	a, p, err := approval.ParseApproved(r.Approved)
	if err != nil {
		return wire.Recovery{}, err
	}
	params, err := p.RecoverParams()
	if err != nil {
		return wire.Recovery{}, err
	}
	v := wire.Recovery{
		Epoch: r.Epoch, ID: r.ID(), Lineage: r.Lineage(st.Cluster()), Index: params.Index, LogSize: params.LogSize, Time: at(r.Time),
		Reason: p.Reason, Voters: params.Voters, Approved: r.Approved,
	}
	for _, s := range a.Statements {
		v.Custodians = append(v.Custodians, s.Custodian)
	}
	return v, nil
}

// KeptSeed is the post-quantum half of the node's hardware root as its device has
// wrapped it.
type KeptSeed struct {
	Root    uint32 // number
	Suite   uint16
	Wrapped []byte
}

// keepSeed has the cluster keep the wrapped seed of this node's root, so that the
// node can be set up again from a backup and its device.
func (a *Agent) keepSeed(ctx context.Context, st *state.State) error {
	s := a.e.cfg.Seed
	_, err := a.e.submit(ctx, attempt{}, state.KeepSeed{Root: s.Root, Suite: s.Suite, Wrapped: s.Wrapped})
	return err
}

// seedMissing reports whether the cluster lacks the seed of this node's present root.
func (a *Agent) seedMissing(st *state.State) bool {
	s := a.e.cfg.Seed
	n, ok := st.Node(a.e.node)
	if s == nil || !ok || n.Root != s.Root || !bytes.Equal(n.Agreement, a.e.agreement) || len(st.Lacking(state.CommandKind{Type: state.TypeKeepSeed, Version: state.CommandVersion})) > 0 {
		return false
	}
	kept, ok := st.Seed(a.e.node)
	return !ok || kept.Root != s.Root || !bytes.Equal(kept.Wrapped, s.Wrapped)
}
