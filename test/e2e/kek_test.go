package e2e

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// kekKeys is how many keys the rotated keyring has: three batches.
const kekKeys = 520

// kekRing makes a keyring at all sites with many keys.
func (s site) kekRing(name string) {
	s.t.Helper()
	cl := s.client("fr", "operator")
	if _, err := cl.CreateKeyring(s.t.Context(), wire.CreateKeyringRequest{Name: name, Residency: []string{"fr", "de", "jp"}, Policy: "keys"}); err != nil {
		s.t.Fatal(err)
	}
	var wg sync.WaitGroup
	failed := make([]error, kekKeys)
	for worker := range 16 {
		wg.Go(func() {
			for i := worker; i < kekKeys; i += 16 {
				_, failed[i] = cl.CreateKey(s.t.Context(), name, wire.CreateKeyRequest{Name: fmt.Sprintf("k-%03d", i), Purpose: "encrypt"})
			}
		})
	}
	wg.Wait()
	if err := errors.Join(failed...); err != nil {
		s.t.Fatal(err)
	}
	s.settled()
}

// always decrypts old ciphertexts at whatever node is up until it is stopped, and
// returns how often it did.
func (s site) always(ring string, old map[string]wire.EncryptResponse) (stop func() int) {
	s.t.Helper()
	cl, err := s.c.ClientAll("fr", "service")
	if err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done, n := make(chan error, 1), 0
	go func() {
		for ctx.Err() == nil {
			for key, c := range old {
				r, err := cl.Key(ring, key).Decrypt(ctx, wire.DecryptRequest{Ciphertext: c.Ciphertext})
				if ctx.Err() == nil && (err != nil || string(r.Plaintext) != key) {
					done <- fmt.Errorf("%s after %d decryptions: %v", key, n, err)
					return
				}
				n++
			}
		}
		done <- nil
	}()
	return func() int {
		cancel()
		if err := <-done; err != nil {
			s.t.Errorf("an old ciphertext did not decrypt: %v", err)
		}
		return n
	}
}

// ring waits until a node's view of a keyring is as wanted.
func (s site) ring(at, name, what string, is func(wire.Keyring) bool) wire.Keyring {
	s.t.Helper()
	var k wire.Keyring
	err := harness.Within(s.t.Context(), 90*time.Second, name+" at "+at+": "+what, func(ctx context.Context) (err error) {
		if k, err = s.client(at, "operator").Keyring(ctx, name); err == nil && !is(k) {
			err = fmt.Errorf("KEK %d, rotation %+v", k.KEK, k.Rotation)
		}
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return k
}

// rotateKEK proposes by the CLI, and custodians approve.
func (s site) rotateKEK(name string) {
	s.t.Helper()
	res, err := s.c.CLI(s.t.Context(), s.c.EnvAs("fr", "fr"), "keyring", "rotate", name, "--reason", "a test")
	if err == nil {
		err = res.Err()
	}
	if err != nil {
		s.t.Fatal(err)
	}
	all, err := s.client("fr", "operator").Proposals(s.t.Context(), wire.ProposalQuery{})
	if err != nil {
		s.t.Fatal(err)
	}
	for _, p := range all {
		if p.Content.Target == approval.KeyringTarget(name) && p.Progress == "open" {
			s.approve(s.custodian("fr-1"), p)
			s.approve(s.custodian("de-1"), p)
			return
		}
	}
	s.t.Fatal("the proposal is gone")
}

// waits reports whether a rotation waits for one node alone.
func waits(r *wire.KEKRotation, node string) bool {
	return r != nil && len(r.Awaits) == 1 && r.Awaits[0] == node
}

// TestKEKRotation rotates the KEK of a keyring with many keys, with nodes frozen and
// killed while it is under way: before the receipts are in, before what is rewrapped is
// confirmed, and whenever it happens to be. Old ciphertexts decrypt all the time.
func TestKEKRotation(t *testing.T) {
	s := site{t, cluster(t)}
	ring := unique("rewrap")
	s.kekRing(ring)
	old := map[string]wire.EncryptResponse{}
	for i := 0; i < kekKeys; i += kekKeys / 8 {
		key := fmt.Sprintf("k-%03d", i)
		old[key] = s.encrypt("fr", ring, key, key)
	}
	stop := s.always(ring, old)
	fr, de, jp := s.c.Nodes["fr"], s.c.Nodes["de"], s.c.Nodes["jp"]
	if err := jp.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = jp.Resume() }) // also when the test fails half-way
	s.rotateKEK(ring)
	s.ring("de", ring, "the receipt of jp is missing", func(k wire.Keyring) bool { return k.KEK == 1 && waits(k.Rotation, "jp-1") })
	if err := fr.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := jp.Resume(); err != nil {
		t.Fatal(err)
	}
	half := s.ring("de", ring, "all is rewrapped and fr has to confirm it", func(k wire.Keyring) bool {
		return k.KEK == 2 && waits(k.Rotation, "fr-1") && k.Rotation.Left == 0
	})
	if r := half.Rotation; r.Versions != kekKeys || r.Rewrapped != kekKeys || r.Done != 0 || len(r.Live) != 2 {
		t.Errorf("%+v", r)
	}
	res, err := s.c.CLI(t.Context(), s.c.EnvAs("de", "fr"), "keyring", "show", ring)
	if err != nil || res.Err() != nil || !strings.Contains(res.Stdout, "to be confirmed by fr-1") {
		t.Errorf("keyring show: %v, %q", err, res.Stdout)
	}
	if err := de.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, n := range []*harness.Node{fr, de} {
		if err := n.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	over := func(kek uint32) {
		t.Helper()
		for _, n := range s.c.All() {
			s.ring(n.Site, ring, "the old KEK is retired", func(k wire.Keyring) bool { return k.KEK == kek && k.Rotation == nil })
			for key, c := range old {
				s.decrypts(n.Site, ring, key, c, key)
			}
		}
		if n := stop(); n < 50 {
			t.Errorf("only %d decryptions meanwhile", n)
		}
	}
	over(2)
	// And again, with each node killed once, the one that rewraps among them.
	stop = s.always(ring, old)
	s.rotateKEK(ring)
	s.ring("jp", ring, "the new KEK is in use", func(k wire.Keyring) bool { return k.KEK == 3 })
	for _, n := range s.c.All() {
		if err := n.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	over(3)
	s.key(ring, "new", kms.Encrypt, "")
	s.decrypts("de", ring, "new", s.encrypt("jp", ring, "new", "x"), "x")
}
