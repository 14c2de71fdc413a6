package engine

import (
	"context"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// Consistency. Administrative requests, reads and writes alike, are linearizable at
// every node: the node first catches up with all that the cluster had committed when
// the request arrived, which its leader proves with a quorum, and then decides, also about
// the caller's rights, from that state. What a node tells of itself, and data operations, are
// answered from the state at hand: those are bounded by max_staleness.

// atHand lists the actions that do not wait for the cluster.
var atHand = map[Action]bool{
	ActEncrypt: true, ActDecrypt: true, ActRewrap: true, ActDataKey: true, ActDataKeyWrapped: true, ActMAC: true, ActVerifyMAC: true,
	ActSign: true, ActVerify: true, ActPublicKey: true, ActExport: true, ActExportMaterial: true,
	ActReadStatus: true, ActReadMetrics: true,
}

// upToDate catches up with the cluster where the request needs it. Errors:
// kms.Unavailable; nothing was changed then.
func (e *Engine) upToDate(ctx context.Context, rq *request) error {
	if atHand[rq.act] || rq.caller.Local && rq.view {
		return nil
	}
	bounded, cancel := context.WithTimeout(ctx, catchUpTime)
	defer cancel()
	err := e.cluster.Barrier(bounded)
	if err == nil {
		return nil
	}
	return kms.Wrap(kms.Unavailable, err, "this node reaches no leader with a majority of the cluster, so it cannot tell whether what it knows is still true: "+cause(err),
		"try again, or use another node; to see what this node knows, right or not, ask for its local view (conclave --local, header "+LocalHeader+": local)")
}

// catchUpTime is how long a request waits for the cluster's leader: longer than it takes
// to elect one over long distances, and shorter than callers wait for an answer, so that they learn why there is none.
const catchUpTime = 10 * time.Second

// LocalHeader is the HTTP header by which a caller asks for a node's local view.
const LocalHeader = "Conclave-Consistency"
