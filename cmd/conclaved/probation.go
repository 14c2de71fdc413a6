package main

import (
	"context"
	"errors"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/tpm"
)

// again turns the reason for which the cluster's part halted into a new start where that
// is the remedy: a node that learns late that its disk was put back starts on probation.
func (n *node) again(err error) error {
	if errors.Is(err, cluster.ErrRolledBack) {
		n.log.Error("the node starts again, on probation", "err", err)
		return errAgain
	}
	if errors.Is(err, cluster.ErrStaleLog) {
		n.log.Warn("the node starts again", "err", err)
		return errAgain
	}
	return err
}

// counter returns the device's counter for this node of the cluster with an id, nil if it has none.
func (n *node) counter(ctx context.Context, id string) cluster.Counter {
	switch d := n.device.(type) {
	case *tpm.Device:
		if has, err := d.HasCounter(ctx); err == nil && !has {
			n.log.Warn("the TPM has no counter against rollback: it was provisioned by an older release; add it with: conclaved device add-counter")
			return nil
		}
		return d // where it cannot be asked, the node does not start
	case *hsm.Device:
		c := d.Counter(id + "/" + n.cfg.Node)
		if has, err := c.Exists(ctx); err == nil && !has {
			n.log.Warn("the token keeps no data objects, so it has no counter against rollback")
			return nil
		}
		return c
	}
	n.log.Warn("a group of tokens, and a token in a process of its own, have no counter against rollback")
	return nil
}
