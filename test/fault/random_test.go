package fault

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/keyring"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/fakedevice"
)

// TestNoRandomness takes its random generator from fr's token. The node makes no
// key then, neither keyring nor key nor the new version of an approved rotation,
// and never falls back on the system's generator alone. A token whose generator
// fails is not trusted with anything else either, so the node is not ready.
func TestNoRandomness(t *testing.T) {
	w := cluster(t)
	stocks := w.stocks("fr")
	operator := w.once("fr", "operator")
	for _, s := range stocks {
		s.home = unique("home-" + string(s.level)) // only fr can rotate its keys
		_, err := operator.CreateKeyring(t.Context(), wire.CreateKeyringRequest{
			Name: s.home, Residency: []string{"fr"}, Protection: string(s.level), Policy: "keys", Receipts: string(kms.EveryNode),
		})
		w.do(err)
		_, err = operator.CreateKey(t.Context(), s.home, wire.CreateKeyRequest{Name: "data", Purpose: string(kms.Encrypt)})
		w.do(err)
	}
	w.shim.begin(t, "norandom")
	t.Cleanup(func() { w.shim.end(t, "norandom") })
	for _, s := range stocks {
		_, err := operator.CreateKey(t.Context(), s.warm, wire.CreateKeyRequest{Name: "refused", Purpose: string(kms.Encrypt)})
		refused(t, "a key without randomness", err, kms.Unavailable)
		_, err = operator.CreateKey(t.Context(), s.warm, wire.CreateKeyRequest{Name: "refused", Purpose: string(kms.Sign)})
		refused(t, "a sign key without randomness", err, kms.Unavailable)
		if err != nil {
			mustName(t, "the error", err.Error(), []string{"device"})
		}
		if s.level == kms.Software { // of the other level a keyring has no key of its own
			_, err = operator.CreateKeyring(t.Context(), wire.CreateKeyringRequest{
				Name: "refused", Residency: []string{"fr"}, Protection: string(s.level), Policy: "keys", Receipts: string(kms.EveryNode),
			})
			refused(t, "a keyring without randomness", err, kms.Unavailable)
		}
		s.rotate()
		s.homeRotation = s.approveRotation(s.home, "data")
		s.othersServe()
	}
	w.unready("fr", []string{"device"})
	for _, s := range stocks {
		s.halfWay() // another node has brought it
		s.tried(s.home, "data", s.homeRotation)
		_, err := w.client("de", "operator").Key(s.warm, "refused").Describe(t.Context())
		refused(t, "the key that was refused", err, kms.NotFound)
	}
	w.shim.end(t, "norandom")
	w.recovered("fr", stocks)
	for _, s := range stocks {
		w.eventually(recovery, "fr rotates when its token has randomness again", func(ctx context.Context) error {
			k, err := w.client("fr", "operator").Key(s.home, "data").Describe(ctx)
			if err == nil && (k.Primary != 2 || k.Latest != 2 || len(k.Versions) != 2) {
				err = fmt.Errorf("primary %d, latest %d", k.Primary, k.Latest)
			}
			return err
		})
	}
}

// tried waits until fr's node has failed to bring the new version, and wants
// nothing to be left of the attempt.
func (s *stock) tried(ring, key, id string) {
	t := s.w.t
	t.Helper()
	s.w.eventually(10*time.Second, "fr's node tries the rotation", func(context.Context) error {
		for line := range strings.Lines(s.w.c.Nodes["fr"].Says(200)) {
			if strings.Contains(line, "a task failed") && strings.Contains(line, "proposal/"+id) {
				return nil
			}
		}
		return errors.New("its log does not tell of it")
	})
	k, err := s.w.client("de", "operator").Key(ring, key).Describe(t.Context())
	s.w.do(err)
	if k.Latest != 1 || k.Primary != 1 || len(k.Versions) != 1 {
		t.Errorf("without randomness there is a version %d", k.Latest)
	}
}

// TestFakeRandomness: a device whose generator fails, and one whose generator
// stands still, give no entropy and spoil none.
func TestFakeRandomness(t *testing.T) {
	dev, err := fakedevice.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	broken := errors.New("the noise source has failed")
	dev.Fail(func(op string) error {
		if op == fakedevice.OpRandom {
			return broken
		}
		return nil
	})
	if _, err := keyring.Entropy(t.Context(), dev); !errors.Is(err, kms.Unavailable) || !errors.Is(err, broken) {
		t.Errorf("without a generator: %v", err)
	}
	dev.Fail(nil)
	dev.Corrupt(func(_ string, out []byte) { clear(out) })
	seen := map[string]bool{}
	for range 64 {
		e, err := keyring.Entropy(t.Context(), dev)
		if err != nil {
			t.Fatal(err)
		}
		seen[string(e.Reveal())] = true
		e.Destroy()
	}
	if len(seen) != 64 {
		t.Error("a generator that stands still makes entropy repeat: the system's own is not mixed in")
	}
}
