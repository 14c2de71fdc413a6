package engine

import (
	"errors"
	"fmt"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
)

// clockOff explains a refusal for the times in a command that this node has made at the time
// now. If its clock was too far from the cluster's, the caller's request was not at fault, and
// another node will take it.
func (e *Engine) clockOff(now time.Time, err error) error {
	if !errors.Is(err, kms.Expired) && !errors.Is(err, kms.Invalid) {
		return err
	}
	off := now.UnixMilli() - e.cluster.State().Clock()
	if off >= -state.Window && off <= state.Window {
		return err
	}
	by := (time.Duration(off) * time.Millisecond).Round(time.Second)
	return kms.Wrap(kms.Unavailable, err, fmt.Sprintf("this node's clock and the cluster's differ by %v, so it can make no changes", by),
		"use another node; the site's operator must set this one's clock")
}
