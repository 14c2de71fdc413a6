package harness

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// poll is the time between two looks at a condition.
const poll = 20 * time.Millisecond

// Wait looks at a condition until it holds or ctx ends. cond returns nil when it
// holds, else what is still missing; the last answer is part of the error. An
// error made by Give ends the wait at once.
func Wait(ctx context.Context, what string, cond func(context.Context) error) error {
	tick := time.NewTicker(poll)
	defer tick.Stop()
	start := time.Now()
	var last error
	for {
		err := cond(ctx)
		if err == nil {
			return nil
		}
		var stop giveUp
		if errors.As(err, &stop) {
			return fmt.Errorf("%s: %w", what, stop.error)
		}
		if ctx.Err() == nil || last == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s: not within %v: %w", what, time.Since(start).Round(time.Millisecond), last)
		case <-tick.C:
		}
	}
}

// Within is Wait with a deadline of its own.
func Within(ctx context.Context, d time.Duration, what string, cond func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, d)
	defer cancel()
	return Wait(ctx, what, cond)
}

type giveUp struct{ error }

// Give wraps an error that waiting cannot cure.
func Give(err error) error { return giveUp{err} }
