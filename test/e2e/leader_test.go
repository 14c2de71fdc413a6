package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// TestLeaderDiesDuringRotation kills the leader with SIGKILL at five points of a
// rotation. Each time service goes on at the others, the rotation is completed
// exactly once after the leader's return, the logs are equal, and what was encrypted
// before, meanwhile and after opens at every node.
func TestLeaderDiesDuringRotation(t *testing.T) {
	points := []struct {
		name      string
		approvals int // given before the leader dies
		reached   func(s site, key string)
	}{
		{"after the proposal is opened", 0, nil},
		{"after the first approval", 1, nil},
		{"after the approval that makes the quorum", 2, nil},
		{"after the new version is committed", 2, func(s site, key string) { s.sees(key, "committed", func(k wire.Key) bool { return k.Latest == 2 }) }},
		{"after the new version is primary", 2, func(s site, key string) { s.sees(key, "primary", func(k wire.Key) bool { return k.Primary == 2 }) }},
	}
	c := cluster(t)
	for _, point := range points {
		t.Run(point.name, func(t *testing.T) {
			s := site{t, c}
			if err := c.Ready(t.Context()); err != nil {
				t.Fatal(err)
			}
			key := unique("leader")
			s.key("coalition", key, kms.Encrypt, "")
			old := s.encrypt("jp", "coalition", key, "before")
			leader, err := c.Leader(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			approvers := []*harness.Custodian{s.custodian("fr-1"), s.custodian("de-1")}
			p := s.propose(kms.ActionRotate, "coalition", key)
			for _, k := range approvers[:point.approvals] {
				s.approve(k, p)
			}
			if point.reached != nil {
				point.reached(s, key)
			}
			killed := time.Now()
			if err := leader.Kill(t.Context()); err != nil {
				t.Fatal(err)
			}
			meanwhile := s.servesWithout(leader, key, old)
			for _, k := range approvers[point.approvals:] {
				s.approve(k, p)
			}
			t.Logf("without %s for %v", leader.ID, time.Since(killed).Round(time.Millisecond))
			if err := leader.Start(t.Context()); err != nil {
				t.Fatal(err)
			}
			s.rotatedOnce(p, key)
			after := s.encrypt(leader.Site, "coalition", key, "after")
			if after.KeyVersion != 2 {
				t.Errorf("a new ciphertext carries version %d", after.KeyVersion)
			}
			for _, n := range c.All() {
				s.decrypts(n.Site, "coalition", key, old, "before")
				s.decrypts(n.Site, "coalition", key, meanwhile, "meanwhile")
				s.decrypts(n.Site, "coalition", key, after, "after")
			}
		})
	}
}

// sees waits until some node that is up describes the key so.
func (s site) sees(key, what string, is func(wire.Key) bool) {
	s.t.Helper()
	cl := s.anywhere()
	err := harness.Within(s.t.Context(), time.Minute, key+" "+what, func(ctx context.Context) error {
		k, err := cl.Key("coalition", key).Describe(ctx)
		if err == nil && !is(k) {
			err = fmt.Errorf("primary %d, latest %d", k.Primary, k.Latest)
		}
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
}

// servesWithout uses the key at the nodes that are left, at once, and has them
// elect a leader and carry out a write. It returns a ciphertext of "meanwhile".
func (s site) servesWithout(dead *harness.Node, key string, old wire.EncryptResponse) wire.EncryptResponse {
	s.t.Helper()
	var left []*harness.Node
	for _, n := range s.c.All() {
		if n != dead {
			left = append(left, n)
		}
	}
	for _, n := range left {
		s.decrypts(n.Site, "coalition", key, old, "before")
	}
	meanwhile := s.encrypt(left[0].Site, "coalition", key, "meanwhile")
	next, err := s.c.Leader(s.t.Context())
	if err != nil {
		s.t.Fatal(err)
	}
	if next == dead {
		s.t.Fatalf("the dead %s still leads", dead.ID)
	}
	s.key("coalition", key+"-meanwhile", kms.MAC, "")
	return meanwhile
}

// rotatedOnce waits until the rotation is complete at every node and checks that
// there is one new version, by this proposal, and one history.
func (s site) rotatedOnce(p wire.Proposal, key string) {
	s.t.Helper()
	for _, n := range s.c.All() {
		k, err := s.c.Activated(s.t.Context(), n.Site, "coalition", key, 2)
		if err != nil {
			s.t.Fatal(err)
		}
		if k.Latest != 2 || len(k.Versions) != 2 || len(k.Proposals) != 0 {
			s.t.Errorf("%s: latest version %d, %d versions, open proposals %v", n.ID, k.Latest, len(k.Versions), k.Proposals)
		}
		for _, v := range k.Versions {
			if v.Version == 2 && (v.Proposal != p.ID || v.State != string(kms.Active)) {
				s.t.Errorf("%s: version 2 is %s, by proposal %s", n.ID, v.State, v.Proposal)
			}
		}
	}
	s.settled()
	commits := map[string]int{}
	for _, n := range s.c.All() {
		now, err := s.client(n.Site, "operator").Proposal(s.t.Context(), p.ID)
		if err != nil {
			s.t.Fatal(err)
		}
		if now.Progress != "executed" {
			s.t.Errorf("%s sees the proposal %s", n.ID, now.Progress)
		}
		r := replay(s.t, s.c, n)
		v, ok := r.state.Version("coalition", key, 2)
		if !ok {
			s.t.Errorf("%s has no version 2 on disk", n.ID)
		}
		commits[string(v.Wrapped)]++
	}
	if len(commits) != 1 {
		s.t.Errorf("the nodes hold %d different versions 2", len(commits))
	}
}
