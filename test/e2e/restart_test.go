package e2e

import (
	"context"
	"path/filepath"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// TestKeysSurvive kills every node in turn, then all at once, and at last restarts
// the whole development cluster with --keep: all keys stay usable everywhere.
func TestKeysSurvive(t *testing.T) {
	t.Parallel()
	bin := binaries(t)
	ctx := t.Context()
	c, err := harness.Start(ctx, bin, filepath.Join(suite.dir, unique("keep")), false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.Logs(15))
		}
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	s := site{t, c}
	s.key("coalition", "all", kms.Encrypt, "")
	s.key("coalition", "tags", kms.MAC, "")
	s.key("europe", "two", kms.Encrypt, "")
	old := s.encrypt("jp", "coalition", "all", "version 1")
	s.rotate("coalition", "all", 2)
	now := s.encrypt("fr", "coalition", "all", "version 2")
	european := s.encrypt("de", "europe", "two", "europe")
	mac, err := s.client("fr", "service").Key("coalition", "tags").MAC(ctx, wire.MACRequest{Message: wire.Secret("m")})
	if err != nil {
		t.Fatal(err)
	}
	usable := func(after string) {
		t.Helper()
		s.settled()
		for _, n := range c.All() {
			s.decrypts(n.Site, "coalition", "all", old, "version 1")
			s.decrypts(n.Site, "coalition", "all", now, "version 2")
			if again := s.encrypt(n.Site, "coalition", "all", after); again.KeyVersion != 2 {
				t.Errorf("%s: %s encrypts with version %d", after, n.ID, again.KeyVersion)
			}
			v, err := s.client(n.Site, "service").Key("coalition", "tags").VerifyMAC(ctx, wire.VerifyMACRequest{Message: wire.Secret("m"), MAC: mac.MAC})
			if err != nil || !v.Valid {
				t.Errorf("%s: the MAC at %s: valid %v, %v", after, n.ID, v.Valid, err)
			}
			if n.Site != "jp" {
				s.decrypts(n.Site, "europe", "two", european, "europe")
			}
		}
	}
	usable("at first")
	for _, n := range c.All() {
		if err := n.Kill(ctx); err != nil {
			t.Fatal(err)
		}
		if err := n.Start(ctx); err != nil {
			t.Fatal(err)
		}
		usable("after SIGKILL of " + n.ID)
	}
	for _, n := range c.All() {
		if err := n.Kill(ctx); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range c.All() {
		if err := n.Launch(); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	usable("after SIGKILL of all")

	cluster := c.Vars["CONCLAVE_CLUSTER"]
	if err := c.Restart(ctx); err != nil {
		t.Fatal(err)
	}
	if c.Vars["CONCLAVE_CLUSTER"] != cluster {
		t.Errorf("--keep made another cluster")
	}
	usable("after --keep")
	s.rotate("coalition", "all", 3)
	s.decrypts("jp", "coalition", "all", old, "version 1")
}

// TestFrozenNode freezes the leader with SIGSTOP: the others elect another and go
// on; the frozen one comes back and catches up.
func TestFrozenNode(t *testing.T) {
	s := site{t, cluster(t)}
	thaw := unique("thaw")
	leader, err := s.c.Leader(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := leader.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = leader.Resume() }) // also when the test fails half-way
	var others []string
	for _, n := range s.c.All() {
		if n != leader {
			others = append(others, n.Site)
		}
	}
	next, err := s.c.Leader(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if next == leader {
		t.Fatalf("the frozen %s still leads", leader.ID)
	}
	cl, err := s.c.ClientAll("fr", "operator", others...)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := cl.CreateKey(t.Context(), "coalition", wire.CreateKeyRequest{Name: thaw, Purpose: "encrypt"}); err != nil {
		t.Fatal(err)
	}
	if err := leader.Resume(); err != nil {
		t.Fatal(err)
	}
	if err := leader.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	err = harness.Within(t.Context(), time.Minute, "the thawed node has the new key", func(ctx context.Context) error {
		_, err := s.client(leader.Site, "operator").Key("coalition", thaw).Describe(ctx)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	s.decrypts(leader.Site, "coalition", thaw, s.encrypt(others[0], "coalition", thaw, "x"), "x")
}
