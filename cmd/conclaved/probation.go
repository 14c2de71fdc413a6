package main

import (
	"context"
	"errors"

	"github.com/conclave-kms/conclave/cluster"
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

// counter returns the device's counter, nil if it has none.
func (n *node) counter(ctx context.Context) cluster.Counter {
	c, ok := n.device.(interface {
		cluster.Counter
		HasCounter(ctx context.Context) (bool, error)
	})
	if !ok {
		return nil
	}
	if has, err := c.HasCounter(ctx); err == nil && !has {
		if n.cfg.Device.Type == "tpm" {
			n.log.Warn("the TPM has no counter against rollback: it was provisioned by an older release; add it with: conclaved device add-counter")
		} else {
			n.log.Warn("the token keeps no data objects, so it has no counter against rollback")
		}
		return nil
	}
	return c // where it cannot be asked, the node does not start
}
