package engine

import (
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
)

// A node whose clock is wrong says so, and that another will do it, rather than that the
// request is wrong. What is wrong with the request the others say.
func TestClockOff(t *testing.T) {
	w := newWorld(t, "")
	w.keyring("r", "fr")
	w.key("r", "data", kms.Encrypt)
	e, q := w.at("fr").engine, wire.OpenProposalRequest{Action: "rotate", Target: "key/r/data", Reason: "test"}
	right := e.now
	for _, off := range []time.Duration{-time.Hour, -11 * time.Minute, 11 * time.Minute, time.Hour} {
		e.now = func() time.Time { return right().Add(off) }
		_, err := e.OpenProposal(bg, caller("operator", "fr"), q)
		wantKind(t, err, kms.Unavailable)
	}
	e.now = right
	bad := q
	bad.ExpiresInMS = (25 * time.Hour).Milliseconds()
	_, err := e.OpenProposal(bg, caller("operator", "fr"), bad)
	wantKind(t, err, kms.Invalid)
	for _, off := range []time.Duration{-9 * time.Minute, 9 * time.Minute} {
		e.now = func() time.Time { return right().Add(off) }
		if _, err := e.OpenProposal(bg, caller("operator", "fr"), q); err != nil && kms.KindOf(err) != kms.Conflict && kms.KindOf(err) != kms.Exists {
			t.Errorf("%v: %v", off, err)
		}
	}
}
