package engine

import (
	"context"

	"github.com/conclave-kms/conclave/kms/audit"
	cosigned "github.com/conclave-kms/conclave/kms/note"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/wire"
)

// AuditCheckpoints tells how far each log is cosigned.
func (e *Engine) AuditCheckpoints(ctx context.Context, c Caller) (wire.Checkpoints, error) {
	return read(ctx, e, c, ActReadCluster, resource{}, "checkpoints", func(st *state.State) (wire.Checkpoints, error) {
		v := wire.Checkpoints{Logs: []wire.LogCheckpoint{}, Alarms: append([]string{}, e.auditAlarms(st)...)}
		for _, log := range logsOf(st) {
			l, err := e.checkpointView(st, log)
			if err != nil {
				return v, err
			}
			v.Logs = append(v.Logs, l)
		}
		return v, nil
	})
}

func (e *Engine) checkpointView(st *state.State, log string) (wire.LogCheckpoint, error) {
	v := wire.LogCheckpoint{Log: log, Sites: []wire.Cosignatory{}, WindowMS: e.lags.of(log, e.now()).Milliseconds()}
	h, ok := audit.LatestHead(st, log)
	v.Restart, v.Size, v.Root, v.State = h.Restart, h.Size, h.Root, h.State
	v.Cosigned = audit.CosignedSize(st, log, h.Restart)
	if node, access := audit.OwnerOf(log); access {
		n, _ := st.Node(node)
		cp, _ := st.Checkpoint(node)
		v.Site, v.Time, v.Forked = n.Site, at(cp.Time), cp.Fork != nil
	}
	for _, c := range st.Cosignatures(log) {
		v.Sites = append(v.Sites, wire.Cosignatory{Site: c.Site, Node: c.Node, Size: c.Size, Time: at(c.Time)})
		if log == cosigned.ClusterLog && c.Size == h.Size && v.Time.Before(at(c.Time)) {
			v.Time = at(c.Time)
		}
	}
	if !ok {
		return v, nil
	}
	var err error
	v.Note, err = audit.SignedNote(st, h)
	return v, err
}
