package engine

import (
	"context"
	"slices"
	"strconv"

	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/wire"
)

// actSuspect names in the access log what a node has come to suspect of the leader, or of
// another node's clock.
const actSuspect Action = "leader:suspect"

// Suspect records a suspicion in this node's access log, as an act of the node's own.
// Errors: those of the log.
func (e *Engine) Suspect(ctx context.Context, s wire.Suspicion) error {
	e.metrics.suspicion(s.Kind)
	return e.note(ctx, e.cluster.State(), actSuspect, approval.NodeTarget(s.Origin), map[string]string{
		"kind": s.Kind, "leader": s.Leader, "term": strconv.FormatUint(s.Term, 10), "delay_ms": strconv.FormatInt(s.DelayMS, 10), "text": s.Text,
	})
}

// suspicions are what this node suspects, as alarms. Each node speaks for itself: what it
// saw is no proof for others.
func (e *Engine) suspicions() (l []wire.Alarm) {
	if e.cfg.Raft == nil {
		return nil
	}
	for _, s := range e.cfg.Raft().Suspicions {
		nodes := []string{s.Leader, s.Origin}
		slices.Sort(nodes)
		l = append(l, wire.Alarm{
			ID:   alarmID(wire.AlarmSuspicion, e.node+"/"+s.Kind+"/"+s.Origin, s.First),
			Kind: wire.AlarmSuspicion, Subject: approval.NodeTarget(s.Leader), Since: s.First, Nodes: slices.Compact(nodes), Text: e.node + " reports: " + s.Text,
		})
	}
	return l
}
