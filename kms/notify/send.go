package notify

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"time"

	"go.etcd.io/bbolt"
)

// run sends until ctx ends.
func (o *Outbox) run(ctx context.Context, s *sender) {
	failures := 0
	for {
		number, h, ok := o.first(s)
		if !ok {
			select {
			case <-s.wake:
				continue
			case <-ctx.Done():
				return
			}
		}
		err := o.try(ctx, s, h.Notice)
		if err != nil && ctx.Err() != nil {
			return
		}
		if o.settled(ctx, s, h, err, failures) {
			failures = 0
			if o.remove(s, number) == nil {
				continue
			}
			err = errors.New("the outbox cannot be written")
			o.log.WarnContext(ctx, "a notice was sent and will be again", "webhook", s.Name, "error", err)
		}
		wait := min(o.retry<<min(failures, 20), lastRetry)
		failures++
		t := time.NewTimer(wait)
		select {
		case <-t.C:
		case <-ctx.Done():
			t.Stop()
			return
		}
	}
}

// settled reports whether a notice is done with: taken, refused for good, or too old.
func (o *Outbox) settled(ctx context.Context, s *sender, h held, err error, failures int) bool {
	switch {
	case err == nil:
		s.sent.Add(1)
		if failures > 0 {
			o.log.InfoContext(ctx, "the webhook takes notices again", "webhook", s.Name)
		}
		return true
	case errors.Is(err, errRefused), o.now().UnixMilli()-h.Put >= keepTrying.Milliseconds():
		s.dropped.Add(1)
		o.log.ErrorContext(ctx, "a notice was dropped", "webhook", s.Name, "kind", h.Notice.Kind, "subject", h.Notice.Subject, "error", err)
		return true
	case failures == 0:
		o.log.WarnContext(ctx, "a webhook takes no notices; trying on", "webhook", s.Name, "error", err)
	}
	return false
}

func (o *Outbox) try(ctx context.Context, s *sender, n Notice) error {
	ctx, cancel := context.WithTimeout(ctx, tryTime)
	defer cancel()
	return s.post(ctx, n, o.now())
}

// first returns the notice that has waited longest. One that cannot be read is removed: it is
// this program that has written it.
func (o *Outbox) first(s *sender) (number []byte, h held, ok bool) {
	for {
		var value []byte
		err := o.db.View(func(tx *bbolt.Tx) error {
			k, v := s.queue(tx).Cursor().First()
			number, value = bytes.Clone(k), bytes.Clone(v)
			return nil
		})
		if err != nil || number == nil {
			return nil, held{}, false
		}
		h = held{}
		if err = json.Unmarshal(value, &h); err == nil {
			return number, h, true
		}
		s.dropped.Add(1)
		if o.remove(s, number) != nil {
			return nil, held{}, false
		}
	}
}

func (o *Outbox) remove(s *sender, number []byte) error {
	err := o.db.Update(func(tx *bbolt.Tx) error {
		return s.queue(tx).Delete(number)
	})
	if err == nil {
		s.waiting.Add(-1)
	}
	return err
}
