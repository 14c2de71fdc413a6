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

	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// joined is a coalition whose members change.
type joined struct {
	t *testing.T
	c *harness.Coalition
}

// conclave runs a command as fr's operator, asked at fr-1.
func (j joined) conclave(args ...string) (harness.Result, error) {
	j.t.Helper()
	ctx, cancel := context.WithTimeout(j.t.Context(), time.Minute)
	defer cancel()
	return harness.Run(ctx, j.c.Bin.Conclave, j.c.EnvAs(j.c.Node("fr-1"), "fr", "operator"), nil, args...)
}

// decides opens a proposal with a command, has custodians of all sites approve it, and
// waits until it is carried out.
func (j joined) decides(args ...string) {
	j.t.Helper()
	var p wire.Proposal
	r, err := j.conclave(append(args, "--reason", "a test", "-o", "json")...)
	if err == nil {
		err = r.JSON(&p)
	}
	if err == nil {
		err = j.c.Carry(j.t.Context(), j.c.Node("fr-1"), p, "fr-1", "de-1", "jp-1")
	}
	if err == nil { // one change at a time
		err = harness.Within(j.t.Context(), time.Minute, "Raft counts with it", func(ctx context.Context) error {
			cl, err := j.c.Client(j.c.Node("fr-1"), "operator", 20*time.Second)
			if err != nil {
				return err
			}
			m, err := cl.Members(ctx)
			if err == nil && m.Change != nil {
				err = errors.New("the change about " + m.Change.Node + " is under way")
			}
			return err
		})
	}
	if err != nil {
		j.t.Fatalf("%v: %v\n%s", args, err, j.c.Logs(8))
	}
}

// refused runs a command that must fail saying what is given.
func (j joined) refused(says string, args ...string) {
	j.t.Helper()
	r, err := j.conclave(append(args, "--reason", "a test")...)
	if err != nil || r.Code == 0 || !strings.Contains(r.Stderr, says) {
		j.t.Errorf("%v: code %d, says %q, want %q (%v)", args, r.Code, r.Stderr, says, err)
	}
}

// sees waits until a node says of the members what is wanted: voters in capitals.
func (j joined) sees(at, want string) {
	j.t.Helper()
	err := harness.Within(j.t.Context(), 90*time.Second, "the members are "+want, func(ctx context.Context) error {
		s, err := j.c.Status(ctx, j.c.Node(at))
		if err != nil || s.Raft == nil {
			return errors.Join(err, errors.New("no status"))
		}
		var l []string
		for _, p := range s.Raft.Peers {
			if p.Suffrage == "voter" {
				p.ID = strings.ToUpper(p.ID)
			}
			l = append(l, p.ID)
		}
		if got := strings.Join(l, " "); got != want {
			return fmt.Errorf("they are %s", got)
		}
		return nil
	})
	if err != nil {
		j.t.Fatal(err, j.c.Logs(10))
	}
}

func (j joined) key(at string) client.Key {
	j.t.Helper()
	cl, err := j.c.Client(j.c.Node(at), "service", 20*time.Second)
	if err != nil {
		j.t.Fatal(err)
	}
	return cl.Key("ring", "data")
}

// decrypts holds that a node opens a ciphertext.
func (j joined) decrypts(at string, ct wire.EncryptResponse) {
	j.t.Helper()
	r, err := j.key(at).Decrypt(j.t.Context(), wire.DecryptRequest{Ciphertext: ct.Ciphertext})
	if err != nil || string(r.Plaintext) != "before" {
		j.t.Fatalf("%s: %q, %v", at, r.Plaintext, err)
	}
}

// halts starts a node and waits for its end, which its log must explain.
func (j joined) halts(n *harness.Node, says string) {
	j.t.Helper()
	if err := j.c.Launch(n); err != nil {
		j.t.Fatal(err)
	}
	j.ends(n, says)
}

// ends waits for a node's end, which its log must explain.
func (j joined) ends(n *harness.Node, says string) {
	j.t.Helper()
	err := harness.Within(j.t.Context(), time.Minute, n.ID+" gives up", func(context.Context) error {
		if n.Running() {
			return errors.New("it runs: " + n.Says(3))
		}
		return nil
	})
	if err != nil || !strings.Contains(n.Says(6), says) {
		j.t.Fatalf("%v; it says %s, want %q", err, n.Says(6), says)
	}
}

// introduce tells a node that joins who the members are, as it is needed where the founders
// are gone.
func (j joined) introduce(n *harness.Node) {
	j.t.Helper()
	file := filepath.Join(j.c.Dir, "introduction.json")
	r, err := j.conclave("node", "introduce", "--out", file)
	if err != nil || r.Code != 0 {
		j.t.Fatalf("node introduce: %v, %s", err, r.Stderr)
	}
	r, err = harness.Run(j.t.Context(), j.c.Bin.Conclaved, j.c.EnvAs(n, "fr", "operator"), nil, "join", "--config", n.Config, "--introduction", file)
	if err != nil || r.Code != 0 {
		j.t.Fatalf("join --introduction: %v, %s", err, r.Stderr)
	}
	if _, err := os.Stat(filepath.Join(n.Data, "introduction.json")); err != nil {
		j.t.Error(err)
	}
}

// TestMembers lets a fourth node join a running cluster, vote, be set up anew, and go.
func TestMembers(t *testing.T) {
	t.Parallel()
	dir, err := os.MkdirTemp("", "conclave-m")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	c, err := harness.Found(t.Context(), binaries(t), dir, harness.Plan{Nodes: map[string]int{"fr": 1, "de": 1, "jp": 1}, Direct: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	if err := c.Start(t.Context()); err != nil {
		t.Fatal(err, c.Logs(10))
	}
	j := joined{t, c}
	operator, err := c.Client(c.Node("fr-1"), "operator", 20*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := operator.CreateKeyring(t.Context(), wire.CreateKeyringRequest{Name: "ring", Residency: []string{"de", "fr"}, Policy: "keys"}); err != nil {
		t.Fatal(err)
	}
	if _, err := operator.CreateKey(t.Context(), "ring", wire.CreateKeyRequest{Name: "data", Purpose: "encrypt"}); err != nil {
		t.Fatal(err)
	}
	ct, err := j.key("fr-1").Encrypt(t.Context(), wire.EncryptRequest{Plaintext: wire.Secret("before")})
	if err != nil {
		t.Fatal(err)
	}

	// It joins, without a vote, and opens what its site may.
	fr2, err := c.Add(t.Context(), "fr", "fr-2")
	if err != nil {
		t.Fatal(err)
	}
	j.introduce(fr2)
	j.decides("node", "join", "--card", fr2.Card())
	j.refused("has not yet adopted", "node", "promote", "fr-2")
	if err := c.Launch(fr2); err != nil {
		t.Fatal(err)
	}
	if err := fr2.Ready(t.Context()); err != nil {
		t.Fatal(err, c.Logs(15))
	}
	j.sees("fr-1", "DE-1 FR-1 fr-2 JP-1")
	j.decrypts("fr-2", ct)

	// It votes.
	j.decides("node", "promote", "fr-2")
	j.sees("fr-2", "DE-1 FR-1 FR-2 JP-1")
	j.refused("site fr would have 2 of 3 voters, a majority", "node", "remove", "de-1")
	if err := fr2.Restart(t.Context()); err != nil { // in a state from before it joined it knows itself
		t.Fatal(err, c.Logs(15))
	}
	j.decrypts("fr-2", ct)

	// Set up anew it does not come back under its name.
	if err := fr2.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	kept, lost := filepath.Join(dir, "kept"), filepath.Join(fr2.Data, "raft")
	if err := os.Rename(lost, kept); err != nil {
		t.Fatal(err)
	}
	j.halts(fr2, "under a new name")
	j.refused("there is a node fr-2", "node", "join", "--card", fr2.Card())

	// With its log it does; then it goes, and does not come back with that either.
	if err := errors.Join(os.RemoveAll(lost), os.Rename(kept, lost)); err != nil {
		t.Fatal(err)
	}
	if err = c.Launch(fr2); err == nil {
		err = fr2.Ready(t.Context())
	}
	if err != nil {
		t.Fatal(err, c.Logs(15))
	}
	j.decides("node", "remove", "fr-2")
	j.sees("de-1", "DE-1 FR-1 JP-1")
	j.ends(fr2, "was removed")
	j.halts(fr2, "was removed")
	j.refused("was removed by proposal", "node", "join", "--card", fr2.Card())
	j.decrypts("de-1", ct)
	// A site comes and goes.
	j.decides("site", "add", "it", "--trust-domain", "it.example", "--ca", filepath.Join(dir, "ca", "jp.pem"))
	j.decides("site", "cas", "it", "--ca", filepath.Join(dir, "ca", "fr.pem"))
	r, err := j.conclave("site", "list")
	if err != nil || !strings.Contains(r.Stdout, "it.example") {
		t.Errorf("site list says %q, %v", r.Stdout, err)
	}
	j.decides("site", "remove", "it")
	j.refused("site jp has node jp-1", "site", "remove", "jp")
	r, err = j.conclave("node", "list")
	if err != nil || !strings.Contains(r.Stdout, "REMOVED") || !strings.Contains(r.Stdout, "fr-2") {
		t.Errorf("node list says %q, %v", r.Stdout, err)
	}
}
