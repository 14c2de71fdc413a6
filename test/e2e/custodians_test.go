package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// TestLostKey: a custodian of the same site suspends a colleague's key at once, whose
// approval of an open proposal no longer counts anywhere; custodians of other sites restore
// it. One more key is enrolled with its card and removed again.
func TestLostKey(t *testing.T) {
	s := site{t, cluster(t)}
	dir := t.TempDir()
	person := s.c.Env("fr").With("CONCLAVE_MEMORY", filepath.Join(dir, "memory"))
	run := func(code int, args ...string) harness.Result {
		t.Helper()
		r, err := s.c.CLI(t.Context(), person, args...)
		if err != nil || r.Code != code {
			t.Fatalf("conclave %s: %v, exit code %d, wanted %d: %s", strings.Join(args, " "), err, r.Code, code, r.Stderr)
		}
		return r
	}
	by := func(id string) []string {
		key, pass := s.c.CustodianFiles(id)
		return []string{"--custodian-key", key, "--pass-file", pass}
	}
	state := func(id string) wire.Custodian {
		t.Helper()
		var all []wire.Custodian
		if err := run(0, "custodian", "list", "-o", "json").JSON(&all); err != nil {
			t.Fatal(err)
		}
		for _, c := range all {
			if c.ID == id {
				return c
			}
		}
		t.Fatalf("there is no custodian %s", id)
		return wire.Custodian{}
	}
	carry := func(done func(wire.Custodian) bool, id string, approvers []string, args ...string) {
		t.Helper()
		var p wire.Proposal
		if err := run(0, append(args, "--reason", "a test", "-o", "json")...).JSON(&p); err != nil {
			t.Fatal(err)
		}
		for _, a := range approvers {
			run(0, append([]string{"proposal", "approve", p.ID, "--yes"}, by(a)...)...)
		}
		err := harness.Within(t.Context(), time.Minute, strings.Join(args[:3], " "), func(context.Context) error {
			if c := state(id); !done(c) {
				return fmt.Errorf("it is %+v", c)
			}
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}

	name := unique("lost")
	s.key("coalition", name, kms.Encrypt, "")
	p := s.propose(kms.ActionRotate, "coalition", name)
	s.approve(s.custodian("fr-2"), p)
	lost := state("fr-2").Credentials[0].ID
	suspend := []string{"custodian", "suspend", "fr-2", "--key", lost, "--reason", "left on a train", "--yes"}
	run(3, append(suspend, by("de-1")...)...) // of another site
	run(0, append(suspend, by("fr-1")...)...)
	s.settled()
	for _, n := range s.c.All() {
		now, err := s.client(n.Site, "operator").Proposal(t.Context(), p.ID)
		if err != nil || now.Approvals != 0 {
			t.Errorf("%s counts %d approvals, %v", n.ID, now.Approvals, err)
		}
	}
	if _, err := s.anywhere().Vote(t.Context(), p.ID, wire.VoteRequest{Statement: statement(t, s.custodian("fr-2"), s.propose(kms.ActionSuspend, "coalition", name))}); err == nil {
		t.Error("a suspended key votes")
	}
	carry(func(c wire.Custodian) bool { return !c.Credentials[0].Suspended }, "fr-2", []string{"de-1", "jp-1", "de-2"}, "custodian", "restore", "fr-2")

	// One more key, by card, and away with it.
	key, card := filepath.Join(dir, "more"), filepath.Join(dir, "more.card")
	if err := os.WriteFile(key+".pass", []byte("of no use\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	run(0, "custodian", "keygen", "--out", key, "--pass-file", key+".pass")
	run(0, "custodian", "card", "--custodian", "jp-2", "--cluster", s.c.Vars["CONCLAVE_CLUSTER"], "--custodian-key", key, "--pass-file", key+".pass", "--out", card)
	r, err := s.c.CLI(t.Context(), person, "custodian", "add-key", "jp-2", "--key", key+".pub", "--reason", "no proof")
	if err = errors.Join(err, r.Err()); err == nil || !strings.Contains(r.Stderr, "no proof that") {
		t.Errorf("a key without the proof that its holder has it: %v", err)
	}
	quorum := []string{"fr-1", "de-1", "jp-1"}
	carry(func(c wire.Custodian) bool { return len(c.Credentials) == 2 }, "jp-2", quorum, "custodian", "add-key", "jp-2", "--key", card)
	var made struct{ Fingerprint string }
	again := filepath.Join(dir, "again.card")
	if err := run(0, "custodian", "card", "--custodian", "jp-2", "--cluster", s.c.Vars["CONCLAVE_CLUSTER"], "--custodian-key", key, "--pass-file", key+".pass", "--out", again, "-o", "json").JSON(&made); err != nil {
		t.Fatal(err)
	}
	carry(func(c wire.Custodian) bool { return len(c.Credentials) == 1 }, "jp-2", quorum, "custodian", "remove-key", "jp-2", "--key", made.Fingerprint)
}
