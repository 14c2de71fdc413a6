package cluster

import (
	"context"
	"fmt"
	"math"
	"sync"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// Counter is a device's counter. It does not go back when the node's disk is put back.
type Counter interface {
	// Count returns the counter's value; 0 if it was never incremented.
	Count(ctx context.Context) (uint64, error)
	// Increment adds one and returns the new value.
	Increment(ctx context.Context) (uint64, error)
}

// countEvery is the time between two increments while the log grows. A TPM wears out by
// writing: at this rate it takes decades.
const countEvery = 10 * time.Minute

// counter is the node's use of its device's counter. The disk keeps, signed, the
// node's position at each count; a disk whose count is behind the device's was put back.
type counter struct {
	device Counter // nil: none

	mu    sync.Mutex
	now   uint64 // of the device
	kept  uint64 // by the disk at the start
	at    position
	since time.Time // of the last increment

	failed time.Time // the last increment that did; the zero value for none since it has counted
}

// read takes the device's and the disk's count at the start.
func (c *counter) read(ctx context.Context, kept *mark) error {
	if c.device == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, signTimeout)
	defer cancel()
	v, err := c.device.Count(ctx)
	if err != nil {
		return kms.Wrap(kms.Unavailable, err, fmt.Sprintf("cannot read the device's counter: %v", err), "check the device and start the node again")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now = v
	if kept != nil {
		c.kept = kept.Counter
	}
	return nil
}

// behind returns the device's count, and whether the disk was from before it at the start.
func (c *counter) behind() (device uint64, behind bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now, c.device != nil && c.kept < c.now
}

func (c *counter) value() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.now
}

// next returns the device's count, and one that the device does not exceed by being incremented
// once, even if the command has to be sent to it twice. A TPM's counter that was never incremented reads 0
// and begins above all that the TPM ever had (TPM 2.0 part 1, 37.2.3): a node that is cut short at
// that very moment believes that its disk was put back, which is better than a disk that is never too old.
func (c *counter) next(ctx context.Context) (now, next uint64, err error) {
	v, err := c.device.Count(ctx)
	if err == nil && v > math.MaxUint64-2 {
		err = kms.Errorf(kms.Unavailable, "the device's counter is at its end")
	}
	if err != nil {
		return 0, 0, err
	}
	return v, v + 2, nil
}

// countAgain is the time after which a count that has failed is tried again.
const countAgain = time.Minute

// put notes that the device did not count.
func (c *counter) put(now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failed = now
}

// keeps returns the count on this node's disk.
func (c *counter) keeps() uint64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.kept
}

// due reports whether it is time to count.
func (c *counter) due(at position, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.device != nil && (c.failed.IsZero() || now.Sub(c.failed) >= countAgain) && (c.since.IsZero() || now.Sub(c.since) >= countEvery && at != c.at)
}

// counted notes an increment.
func (c *counter) counted(v uint64, at position, now time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.now, c.kept, c.at, c.since, c.failed = v, v, at, now, time.Time{}
}
