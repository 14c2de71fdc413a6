// Package e2e tests the real programs end to end, on development clusters with
// SoftHSM tokens and a software TPM: what a coalition is promised must hold
// against killed processes, hostile members and whoever reads the disks.
package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// suite is what the tests of this package share: the programs, and one cluster
// that every test leaves with all its nodes running.
var suite struct {
	sync.Mutex
	dir     string
	bin     harness.Binaries
	built   bool
	cleanup []func()
	shared  *harness.Cluster
}

func TestMain(m *testing.M) {
	code := m.Run()
	suite.Lock()
	if suite.shared != nil {
		if err := suite.shared.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	for _, f := range suite.cleanup {
		f()
	}
	os.Exit(code)
}

// need skips the test, or fails it when CI=true, where this machine lacks a tool.
func need(t *testing.T) {
	t.Helper()
	if testing.Short() && os.Getenv("CI") != "true" {
		t.Skip("end-to-end tests are not short")
	}
	if err := harness.MissingTools(); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
}

// prepare builds the programs, once. The caller holds the lock.
func prepare(t *testing.T) {
	t.Helper()
	if suite.built {
		return
	}
	bin, remove, err := harness.Find(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "conclave-e2e") // short: it will hold a Unix socket
	if err != nil {
		remove()
		t.Fatal(err)
	}
	suite.bin, suite.dir, suite.built = bin, dir, true
	suite.cleanup = append(suite.cleanup, remove, func() { _ = os.RemoveAll(dir) })
}

// binaries returns the programs.
func binaries(t *testing.T) harness.Binaries {
	t.Helper()
	need(t)
	suite.Lock()
	defer suite.Unlock()
	prepare(t)
	return suite.bin
}

// cluster returns the shared cluster with all nodes ready.
func cluster(t *testing.T) *harness.Cluster {
	t.Helper()
	need(t)
	suite.Lock()
	defer suite.Unlock()
	prepare(t)
	if suite.shared == nil {
		c, err := harness.Start(context.Background(), suite.bin, filepath.Join(suite.dir, "c"), false)
		if err != nil {
			t.Fatal(err)
		}
		suite.shared = c
	}
	c := suite.shared
	if err := c.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.Logs(15))
		}
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		defer cancel()
		if err := c.Ready(ctx); err != nil {
			t.Errorf("the test leaves the cluster broken: %v", err)
		}
	})
	return c
}

var names atomic.Uint64

// unique returns a name that no other test and no repetition of it uses.
func unique(base string) string { return fmt.Sprintf("%s-%d", base, names.Add(1)) }

// site is a cluster as a test sees it: every call must succeed.
type site struct {
	t *testing.T
	c *harness.Cluster
}

func (s site) client(name, role string) *client.Client {
	s.t.Helper()
	cl, err := s.c.Client(name, role)
	if err != nil {
		s.t.Fatal(err)
	}
	return cl
}

// anywhere returns an operator's client that finds a node that is up.
func (s site) anywhere() *client.Client {
	s.t.Helper()
	cl, err := s.c.ClientAll("fr", "operator")
	if err != nil {
		s.t.Fatal(err)
	}
	return cl
}

// settled waits until all running nodes have applied the same entries.
func (s site) settled() {
	s.t.Helper()
	if _, _, err := s.c.SameLog(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
}

// key makes a key and waits until every running node has it.
func (s site) key(keyring, name string, purpose kms.Purpose, alg kms.Algorithm) {
	s.t.Helper()
	_, err := s.anywhere().CreateKey(s.t.Context(), keyring, wire.CreateKeyRequest{Name: name, Purpose: string(purpose), Algorithm: string(alg)})
	if err != nil {
		s.t.Fatalf("create %s/%s: %v", keyring, name, err)
	}
	s.settled()
}

func (s site) encrypt(at, keyring, key, text string) wire.EncryptResponse {
	s.t.Helper()
	r, err := s.client(at, "service").Key(keyring, key).Encrypt(s.t.Context(), wire.EncryptRequest{Plaintext: wire.Secret(text)})
	if err != nil {
		s.t.Fatalf("encrypt with %s/%s at %s: %v", keyring, key, at, err)
	}
	return r
}

func (s site) decrypts(at, keyring, key string, c wire.EncryptResponse, text string) {
	s.t.Helper()
	r, err := s.client(at, "service").Key(keyring, key).Decrypt(s.t.Context(), wire.DecryptRequest{Ciphertext: c.Ciphertext})
	if err != nil {
		s.t.Fatalf("decrypt with %s/%s at %s: %v", keyring, key, at, err)
	}
	if string(r.Plaintext) != text || r.KeyVersion != c.KeyVersion {
		s.t.Fatalf("decrypt with %s/%s at %s: another plaintext, or version %d instead of %d", keyring, key, at, r.KeyVersion, c.KeyVersion)
	}
}

// propose opens a proposal on a key through any node.
func (s site) propose(action kms.Action, keyring, key string) wire.Proposal {
	s.t.Helper()
	p, err := s.anywhere().OpenProposal(s.t.Context(), wire.OpenProposalRequest{
		Action: string(action), Target: approval.KeyTarget(keyring, key), Reason: "a test",
	})
	if err != nil {
		s.t.Fatalf("propose to %s %s/%s: %v", action, keyring, key, err)
	}
	return p
}

func (s site) custodian(id string) *harness.Custodian {
	s.t.Helper()
	k, err := s.c.Custodian(id)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(k.Key.Destroy)
	return k
}

// approve submits the custodian's approval through any node that is up.
func (s site) approve(k *harness.Custodian, p wire.Proposal) wire.Proposal {
	s.t.Helper()
	st, err := k.Statement(approval.Approve, p)
	if err != nil {
		s.t.Fatal(err)
	}
	after, err := s.anywhere().Vote(s.t.Context(), p.ID, wire.VoteRequest{Statement: st})
	if err != nil {
		s.t.Fatalf("approval by %s: %v", k.ID, err)
	}
	return after
}

// rotate carries a rotation through and waits until it is done at every node.
func (s site) rotate(keyring, key string, version uint32) wire.Proposal {
	s.t.Helper()
	p := s.propose(kms.ActionRotate, keyring, key)
	s.approve(s.custodian("fr-1"), p)
	s.approve(s.custodian("de-1"), p)
	for _, n := range s.c.All() {
		if _, err := s.c.Activated(s.t.Context(), n.Site, keyring, key, version); err != nil {
			s.t.Fatal(err)
		}
	}
	return p
}

// refused wants an error of the kind.
func refused(t *testing.T, what string, err error, kind kms.Kind) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Errorf("%s: %v (%v); wanted %v", what, err, kms.KindOf(err), kind)
	}
}
