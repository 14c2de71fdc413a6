package hsm

import (
	"context"
	"errors"
	"time"

	"github.com/miekg/pkcs11"
)

// What testScaling takes for a token that makes MACs one after the other: one that
// is in this machine, to judge by the time of a call, and that two sessions do not
// get notably more out of than one.
const (
	lightCall    = 100 * time.Microsecond
	scalingGain  = 1.3
	scalingCalls = 64
	scalingRuns  = 5
)

// testScaling finds out whether a second session makes more MACs a second. On
// SoftHSM it makes fewer: the sessions contend for its locks.
func (d *Device) testScaling(ctx context.Context) error {
	serial, err := call(ctx, d, callOptions{op: "self test of sessions", own: true}, func(a *session) (bool, error) {
		_, public := d.ImportKey()
		to, err := parseRecipient(public)
		if err != nil {
			return false, err
		}
		h, err := a.loadPlain(to, *d.imports, materialHMAC, make([]byte, HMACKey))
		if err != nil {
			return false, err
		}
		b, err := d.openSession(false, true)
		if err != nil {
			return false, d.sinceOpen(err)
		}
		defer b.close()
		best := [2]time.Duration{time.Hour, time.Hour}
		for range scalingRuns {
			for i, sessions := range [][]*session{{a}, {a, b}} {
				took, err := timeMACs(h, sessions)
				if err != nil {
					return false, err
				}
				best[i] = min(best[i], took)
			}
			if best[0] > scalingCalls*lightCall {
				return false, nil
			}
		}
		gain := 2 * float64(best[0]) / float64(best[1])
		return gain < scalingGain, nil
	})
	d.mu.Lock()
	d.serial = serial
	d.mu.Unlock()
	return err
}

// timeMACs makes scalingCalls MACs on each session at the same time.
func timeMACs(h pkcs11.ObjectHandle, sessions []*session) (time.Duration, error) {
	begin := time.Now()
	errs := make(chan error, len(sessions))
	for _, s := range sessions {
		go func() {
			var err error
			for i := 0; i < scalingCalls && err == nil; i++ {
				_, err = s.hmac(h, make([]byte, 100))
			}
			errs <- err
		}()
	}
	var err error
	for range sessions {
		err = errors.Join(err, <-errs)
	}
	return time.Since(begin), err
}
