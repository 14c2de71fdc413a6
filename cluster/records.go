package cluster

import (
	"context"

	"github.com/conclave-kms/conclave/kms"
)

// answerRecords gives another node what this one keeps of the cluster log.
func (n *Node) answerRecords(leaf uint64) ([]byte, error) {
	if n.cfg.Records == nil {
		return nil, kms.Errorf(kms.Unavailable, "node %s keeps no cluster log", n.cfg.NodeID)
	}
	return n.cfg.Records(leaf)
}

// FetchRecords asks another node for what it keeps of the cluster log from a leaf on. The
// answer is that node's word: the caller holds it against what the state says. Errors:
// those of the other node's Config.Records, and kms.Unavailable.
func (n *Node) FetchRecords(ctx context.Context, peer string, leaf uint64) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, maxRequestTime)
	defer cancel()
	resp, _, err := n.wire.call(ctx, peer, n.cfg.Timing.RPC, request{Op: opRecords, Size: leaf})
	if err != nil {
		return nil, kms.Wrap(kms.Unavailable, err, "node "+peer+" cannot be asked for the cluster log", "")
	}
	if err := resp.err(); err != nil {
		return nil, err
	}
	return resp.Info, nil
}
