package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/backup"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// disaster is a cluster that loses its data, with what its people have at hand.
type disaster struct {
	site
	dir    string      // of backups and statements
	person harness.Env // an operator who remembers what was seen
}

// conclave runs the command, which must succeed.
func (d disaster) conclave(args ...string) harness.Result {
	d.t.Helper()
	r, err := d.c.CLI(d.t.Context(), d.person, args...)
	if err = errors.Join(err, r.Err()); err != nil {
		d.t.Fatal(err)
	}
	return r
}

// refuses runs the command, which must fail with the exit code and say the words.
func (d disaster) refuses(code int, words string, args ...string) {
	d.t.Helper()
	r, err := d.c.CLI(d.t.Context(), d.person, args...)
	if err != nil {
		d.t.Fatal(err)
	}
	if r.Code != code || !strings.Contains(r.Stderr, words) {
		d.t.Errorf("conclave %s: exit code %d, %q; wanted %d and %q", strings.Join(args, " "), r.Code, r.Stderr, code, words)
	}
}

// conclaved runs the daemon's command on a node's configuration and returns the exit
// code and what it said.
func (d disaster) conclaved(n *harness.Node, args ...string) harness.Result {
	d.t.Helper()
	env := harness.Env{}
	for _, name := range []string{"PATH", "HOME", "TMPDIR", "SOFTHSM2_MODULE"} {
		env = env.With(name, os.Getenv(name))
	}
	r, err := harness.Run(d.t.Context(), d.c.Bin.Conclaved, env, nil, append(args, "--config", n.Config)...)
	if err != nil {
		d.t.Fatal(err)
	}
	return r
}

func (d disaster) file(name string) string { return filepath.Join(d.dir, name) }

// backUp makes a backup when every node has put into the cluster what it takes to set
// it up again.
func (d disaster) backUp(name string) string {
	d.t.Helper()
	path := d.file(name)
	err := harness.Within(d.t.Context(), time.Minute, "the seeds of all nodes are in the backup", func(context.Context) error {
		_ = os.Remove(path)
		d.conclave("backup", "create", "--out", path)
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		r, err := backup.Verify(bytes.NewReader(b), backup.Options{Cluster: d.c.Vars["CONCLAVE_CLUSTER"]})
		if err != nil {
			return harness.Give(err)
		}
		for _, n := range d.c.All() {
			if _, ok := r.State.Seed(n.ID); !ok {
				return fmt.Errorf("that of %s is not", n.ID)
			}
		}
		return nil
	})
	if err != nil {
		d.t.Fatal(err)
	}
	return path
}

// statement prepares a recover statement and has custodians approve it.
func (d disaster) statement(name, backup, voters string, custodians ...string) string {
	d.t.Helper()
	path := d.file(name)
	d.conclave("recover", "prepare", "--backup", backup, "--cluster", d.c.Vars["CONCLAVE_CLUSTER"], "--voters", voters, "--reason", "a disaster", "--out", path)
	for _, id := range custodians {
		key, pass := d.c.CustodianFiles(id)
		d.conclave("recover", "approve", path, "--backup", backup, "--cluster", d.c.Vars["CONCLAVE_CLUSTER"], "--custodian-key", key, "--pass-file", pass, "--yes")
	}
	return path
}

func (d disaster) killAll() {
	d.t.Helper()
	for _, n := range d.c.All() {
		if n.Running() {
			if err := n.Kill(d.t.Context()); err != nil {
				d.t.Fatal(err)
			}
		}
	}
}

// notRecovered wants conclaved recover to refuse and to leave no data directory.
func (d disaster) notRecovered(n *harness.Node, why, backup, statement, words string) {
	d.t.Helper()
	r := d.conclaved(n, "recover", "--backup", backup, "--statement", statement)
	if r.Code == 0 || !strings.Contains(r.Stderr, words) {
		d.t.Errorf("%s: exit code %d, %q; wanted %q", why, r.Code, r.Stderr, words)
	}
	if _, err := os.Stat(filepath.Join(n.Data, "raft")); err == nil {
		d.t.Errorf("%s: there is a data directory", why)
	}
}

func (d disaster) recover(n *harness.Node, backup, statement string) {
	d.t.Helper()
	if r := d.conclaved(n, "recover", "--backup", backup, "--statement", statement); r.Code != 0 {
		d.t.Fatalf("%s: %s", n.ID, r.Stderr)
	}
}

// TestDisaster loses the data of all nodes and goes on from a backup with their devices;
// then it loses two nodes of three for good and goes on with the third.
func TestDisaster(t *testing.T) {
	t.Parallel()
	bin := binaries(t)
	c, err := harness.Start(t.Context(), bin, filepath.Join(suite.dir, unique("disaster")), false)
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
	dir := t.TempDir()
	d := disaster{site: site{t, c}, dir: dir, person: c.Env("fr").With("CONCLAVE_MEMORY", filepath.Join(dir, "memory"))}
	d.key("coalition", "letters", kms.Encrypt, "")
	d.key("europe", "two", kms.Encrypt, "")
	before := d.encrypt("jp", "coalition", "letters", "before")
	european := d.encrypt("de", "europe", "two", "europe")

	first := d.backUp("first")
	d.checkBackup(first)
	d.rotate("coalition", "letters", 2)
	lost := d.encrypt("fr", "coalition", "letters", "lost")
	d.vote("letters", "fr-1")
	second := d.backUp("second")

	d.killAll()
	for _, n := range c.All() {
		if err := os.RemoveAll(n.Data); err != nil {
			t.Fatal(err)
		}
	}
	approved := d.allLost(first, second)
	for _, n := range c.All() {
		d.recover(n, first, approved)
	}
	if r := d.conclaved(c.Nodes["fr"], "recover", "--backup", first, "--statement", approved); r.Code != 0 || !strings.Contains(r.Stdout, "already") {
		t.Errorf("a second time: %d, %s%s", r.Code, r.Stdout, r.Stderr)
	}
	if err := c.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	d.settled()
	for _, n := range c.All() {
		d.decrypts(n.Site, "coalition", "letters", before, "before")
		if s, err := c.Status(t.Context(), n.Site); err != nil || s.Epoch != 1 {
			t.Errorf("%s: epoch %d, %v", n.ID, s.Epoch, err)
		}
	}
	d.decrypts("de", "europe", "two", european, "europe")
	if _, err := d.client("fr", "service").Key("coalition", "letters").Decrypt(t.Context(), wire.DecryptRequest{Ciphertext: lost.Ciphertext}); err == nil {
		t.Error("a version made after the backup is back")
	}

	// Who has seen more than the backup does not sign until told that this is meant.
	p := d.propose(kms.ActionDestroy, "coalition", "letters")
	key, pass := c.CustodianFiles("fr-1")
	vote := []string{"proposal", "approve", p.ID, "--custodian-key", key, "--pass-file", pass, "--yes"}
	d.refuses(5, "memory accept", vote...)
	d.conclave("memory", "accept", "--yes")
	d.conclave(vote...)
	d.rotate("coalition", "letters", 2)
	d.decrypts("fr", "coalition", "letters", before, "before")
	d.survivor(before)
}

// vote casts a custodian's vote with the command, which remembers it.
func (d disaster) vote(key, custodian string) {
	d.t.Helper()
	p := d.propose(kms.ActionDestroy, "coalition", key) // waits for days: it stays open
	file, pass := d.c.CustodianFiles(custodian)
	d.conclave("proposal", "approve", p.ID, "--custodian-key", file, "--pass-file", pass, "--yes")
}

// checkBackup has the command verify the backup, and refuse it altered in each of its
// sections.
func (d disaster) checkBackup(path string) {
	d.t.Helper()
	id := d.c.Vars["CONCLAVE_CLUSTER"]
	d.conclave("backup", "verify", path, "--cluster", id)
	d.refuses(5, "not of", "backup", "verify", path, "--cluster", strings.Repeat("0", 32))
	b, err := os.ReadFile(path)
	if err != nil {
		d.t.Fatal(err)
	}
	bad := d.file("altered")
	sections := 0
	for at := len("conclave-backup/1\n"); at < len(b); sections++ {
		size := int(binary.BigEndian.Uint32(b[at+1:]))
		x := bytes.Clone(b)
		x[at+5+size/2] ^= 1
		if err := os.WriteFile(bad, x, 0o600); err != nil {
			d.t.Fatal(err)
		}
		r, err := d.c.CLI(d.t.Context(), d.person, "backup", "verify", bad, "--cluster", id)
		if err != nil || r.Code == 0 {
			d.t.Errorf("altered in the part of type %q: exit code %d, %v", b[at], r.Code, err)
		}
		at += 5 + size
	}
	if sections < 4 {
		d.t.Errorf("the backup has %d sections", sections)
	}
}

// allLost tries what must not bring the cluster back, and returns what does.
func (d disaster) allLost(first, second string) string {
	d.t.Helper()
	n := d.c.Nodes["fr"]
	voters := "fr-1,de-1,jp-1"
	d.notRecovered(n, "custodians of one site", first, d.statement("one-site", first, voters, "fr-1", "fr-2"), "needs")
	approved := d.statement("approved", first, voters, "fr-1", "fr-2", "de-1")
	d.notRecovered(n, "a statement for another backup", second, approved, "another backup")
	other := statetest.New(d.t, statetest.Options{Sites: []string{"de", "fr"}})
	var b bytes.Buffer
	if _, err := backup.Write(d.t.Context(), &b, other.State(), "node-fr-1", "test", time.Now(), other.Node("node-fr-1").Sign); err != nil {
		d.t.Fatal(err)
	}
	foreign := d.file("foreign")
	if err := os.WriteFile(foreign, b.Bytes(), 0o600); err != nil {
		d.t.Fatal(err)
	}
	d.notRecovered(n, "another cluster's backup", foreign, approved, "is of cluster")
	d.notRecovered(n, "an altered backup", d.file("altered"), approved, "altered")
	return approved
}

// survivor loses two nodes for good. The third goes on alone; one that comes back with
// its old disk is not believed.
func (d disaster) survivor(old wire.EncryptResponse) {
	d.t.Helper()
	d.settled()
	d.killAll()
	fr, jp := d.c.Nodes["fr"], d.c.Nodes["jp"]
	last := d.file("last")
	if r := d.conclaved(fr, "backup", "--out", last); r.Code != 0 {
		d.t.Fatal(r.Stderr)
	}
	if r := d.conclaved(fr, "recover", "--backup", d.file("first"), "--statement", d.file("approved")); r.Code != 0 || !strings.Contains(r.Stdout, "already") {
		d.t.Errorf("with the statement of before: %d, %s%s", r.Code, r.Stdout, r.Stderr)
	}
	nation := d.statement("one-nation", last, "fr-1", "fr-1", "fr-2")
	if r := d.conclaved(fr, "recover", "--backup", last, "--statement", nation); r.Code == 0 || !strings.Contains(r.Stderr, "needs") {
		d.t.Errorf("the survivor's nation alone: %d, %s%s", r.Code, r.Stdout, r.Stderr)
	}
	approved := d.statement("alone", last, "fr-1", "fr-1", "jp-1", "jp-2")
	d.recover(fr, last, approved)
	if err := fr.Start(d.t.Context()); err != nil {
		d.t.Fatal(err)
	}
	d.decrypts("fr", "coalition", "letters", old, "before")
	if _, err := d.client("fr", "operator").CreateKey(d.t.Context(), "coalition", wire.CreateKeyRequest{Name: "alone", Purpose: "encrypt"}); err != nil {
		d.t.Error(err)
	}

	if err := jp.Launch(); err != nil {
		d.t.Fatal(err)
	}
	if err := jp.Process().Ended(d.t.Context()); err != nil {
		d.t.Fatalf("the node with the old disk goes on: %v\n%s", err, jp.Says(10))
	}
	if !strings.Contains(jp.Says(10), "goes on in epoch 2") {
		d.t.Errorf("the node with the old disk says:\n%s", jp.Says(10))
	}
	d.recover(jp, last, approved)
	if err := jp.Start(d.t.Context()); err != nil {
		d.t.Fatal(err)
	}
	d.settled()
	d.decrypts("jp", "coalition", "letters", old, "before")
	if s, err := d.c.Status(d.t.Context(), "jp"); err != nil || s.Epoch != 2 {
		d.t.Errorf("jp: epoch %d, %v", s.Epoch, err)
	}
}
