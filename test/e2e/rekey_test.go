package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// rekeyed is a cluster in which nodes get other devices.
type rekeyed struct {
	site
	hard hardRing
	old  map[string]wire.EncryptResponse // by keyring, made before any replacement
}

const beforeRekey = "made under the first devices"

// newRekeyed starts a cluster of its own, whose devices may be broken, with keys of
// both protection levels.
func newRekeyed(t *testing.T) *rekeyed {
	t.Helper()
	bin := binaries(t)
	dir, err := os.MkdirTemp("", "conclave-rk") // short: it will hold a Unix socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	c, err := harness.Start(t.Context(), bin, filepath.Join(dir, "c"), false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.Logs(25))
		}
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	r := &rekeyed{site: site{t, c}, old: map[string]wire.EncryptResponse{}}
	r.hard = r.hardRing(string(kms.OnHost), "de", "fr", "jp")
	r.firstProven()
	r.key("coalition", "data", kms.Encrypt, "")
	r.rotate("coalition", "data", 2)
	for _, ring := range []string{"coalition", r.hard.name} {
		r.old[ring] = r.encrypt("fr", ring, "data", beforeRekey)
	}
	return r
}

// firstProven waits until every node has proven, with its token or TPM, version 1 of
// every key of protection hardware: what they committed to is what a next device is
// held against.
func (r *rekeyed) firstProven() {
	r.t.Helper()
	err := harness.Within(r.t.Context(), 60*time.Second, "receipts for every version 1", func(ctx context.Context) error {
		for _, k := range hardKeys {
			key, err := r.client("fr", "operator").Key(r.hard.name, k.name).Describe(ctx)
			if err != nil {
				return err
			}
			v := key.Versions[0]
			for _, x := range v.Receipts {
				if !x.Received {
					return fmt.Errorf("%s has not proven %s", x.Node, k.name)
				}
			}
			if len(v.Receipts) != len(r.hard.residency) || !v.Primary {
				return fmt.Errorf("version 1 of %s: %+v", k.name, v)
			}
		}
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
}

// newToken makes another SoftHSM token for a site's node and its [next_device].
func (r *rekeyed) newToken(n *harness.Node) (table string) {
	r.t.Helper()
	pin, err := secret.Copy([]byte("47110815"))
	if err != nil {
		r.t.Fatal(err)
	}
	defer pin.Destroy()
	token, err := hsm.CreateSoftToken(r.t.Context(), filepath.Join(n.Dir, "token2"), "second-"+n.Site, pin)
	if err != nil {
		r.t.Fatal(err)
	}
	pinFile := filepath.Join(n.Dir, "pin2")
	if err := os.WriteFile(pinFile, pin.Reveal(), 0o600); err != nil {
		r.t.Fatal(err)
	}
	return fmt.Sprintf("type = \"pkcs11\"\nuri = \"%s&pin-source=file:%s\"\nsofthsm_conf = %q\nisolate = true\n", token.URI, pinFile, token.ConfFile)
}

func (r *rekeyed) configure(n *harness.Node, change func(config string) string) {
	r.t.Helper()
	b, err := os.ReadFile(n.Config)
	if err != nil {
		r.t.Fatal(err)
	}
	after := change(string(b))
	if after == string(b) {
		r.t.Fatal("the configuration stays as it was")
	}
	if err := os.WriteFile(n.Config, []byte(after), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// prepare runs conclaved rekey prepare, twice: the second run changes nothing.
func (r *rekeyed) prepare(n *harness.Node) (card string) {
	r.t.Helper()
	card = filepath.Join(n.Data, "next-node.json")
	var former []byte
	for range 2 {
		res, err := harness.Run(r.t.Context(), r.c.Bin.Conclaved, harness.Env{"PATH": os.Getenv("PATH")}, nil, "rekey", "prepare", "-c", n.Config)
		if err == nil {
			err = res.Err()
		}
		if err != nil {
			r.t.Fatalf("rekey prepare: %v", err)
		}
		root, err := os.ReadFile(filepath.Join(n.Data, "next-root.json"))
		if err != nil {
			r.t.Fatal(err)
		}
		if former != nil && !bytes.Equal(root, former) {
			r.t.Error("a second preparation made another root")
		}
		former = root
	}
	return card
}

// propose runs conclave node rekey --wait at fr until its end, and has custodians
// approve what it proposes.
func (r *rekeyed) proposeRoot(n *harness.Node, card string, custodians ...string) (done <-chan error) {
	r.t.Helper()
	result := make(chan error, 1)
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	r.t.Cleanup(cancel)
	go func() {
		res, err := r.c.CLI(ctx, r.c.EnvAs("fr", "fr"), "node", "rekey", n.ID, "--card", card, "--reason", "a test", "--wait")
		if err == nil {
			err = res.Err()
		}
		if err == nil && (!strings.Contains(res.Stdout, "number 2") || !strings.Contains(res.Stderr, "missing")) {
			err = fmt.Errorf("node rekey --wait said %q and %q", res.Stdout, res.Stderr)
		}
		result <- err
	}()
	var p wire.Proposal
	err := harness.Within(r.t.Context(), 30*time.Second, "the proposal is open", func(ctx context.Context) error {
		all, err := r.client("fr", "operator").Proposals(ctx, wire.ProposalQuery{})
		for _, q := range all {
			if q.Content.Target == "node/"+n.ID && q.Progress == "open" {
				p = q
				return nil
			}
		}
		return errors.Join(err, errors.New("no proposal about it is open"))
	})
	if err != nil {
		r.t.Fatal(err)
	}
	for _, id := range custodians {
		r.approve(r.custodian(id), p)
	}
	return result
}

// node is what fr says of a node.
func (r *rekeyed) node(id string) wire.Node {
	r.t.Helper()
	nodes, err := r.client("fr", "operator").Nodes(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	for _, n := range nodes {
		if n.ID == id {
			return n
		}
	}
	r.t.Fatalf("fr knows no node %s", id)
	return wire.Node{}
}

// replaced waits until the node has adopted root number 2 and serves.
func (r *rekeyed) replaced(n *harness.Node) {
	r.t.Helper()
	err := harness.Within(r.t.Context(), 90*time.Second, n.ID+" has its second root", func(context.Context) error {
		if got := r.node(n.ID); got.Root != 2 || got.Replacing != nil {
			return fmt.Errorf("root %d, replacing %+v", got.Root, got.Replacing)
		}
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	if err := n.Ready(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
	r.settled()
}

// serves holds that a node opens old ciphertexts and others new ones of its, of
// both protection levels.
func (r *rekeyed) serves(at string) {
	r.t.Helper()
	for ring, ct := range r.old {
		r.decrypts(at, ring, "data", ct, beforeRekey)
		fresh := r.encrypt(at, ring, "data", "new at "+at)
		for _, other := range []string{"fr", "de", "jp"} {
			r.decrypts(other, ring, "data", fresh, "new at "+at)
		}
	}
	r.hard.works(at)
}

func (r *rekeyed) restart(n *harness.Node) {
	r.t.Helper()
	if err := n.Kill(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
	if err := n.Start(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
}

// logged waits until the node's log has the words after the mark.
func (r *rekeyed) logged(n *harness.Node, mark int64, words string) {
	r.t.Helper()
	err := harness.Within(r.t.Context(), 60*time.Second, n.ID+" logs "+words, func(context.Context) error {
		b, err := os.ReadFile(n.Log)
		if err == nil && !bytes.Contains(b[min(mark, int64(len(b))):], []byte(words)) {
			err = errors.New("not yet")
		}
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rekeyed) logSize(n *harness.Node) int64 {
	r.t.Helper()
	st, err := os.Stat(n.Log)
	if err != nil {
		r.t.Fatal(err)
	}
	return st.Size()
}

// save returns what puts files of a node back as they are now.
func (r *rekeyed) save(n *harness.Node, names ...string) (putBack func()) {
	r.t.Helper()
	kept := map[string][]byte{}
	for _, name := range names {
		b, err := os.ReadFile(filepath.Join(n.Data, name))
		if err != nil {
			r.t.Fatal(err)
		}
		kept[name] = b
	}
	return func() {
		for name, b := range kept {
			if err := os.WriteFile(filepath.Join(n.Data, name), b, 0o600); err != nil {
				r.t.Fatal(err)
			}
		}
	}
}

// TestRekeyToAnotherToken gives de another SoftHSM token: with the node killed
// between approval and adoption, as if it had crashed between adoption and the
// rename of its files, and with the old token removed.
func TestRekeyToAnotherToken(t *testing.T) {
	t.Parallel()
	r := newRekeyed(t)
	de := r.c.Nodes["de"]
	table := r.newToken(de)
	r.configure(de, func(c string) string { return c + "\n[next_device]\n" + table })
	card := r.prepare(de)
	r.restart(de)
	crash := r.save(de, "root.json", "next-root.json")

	done := r.proposeRoot(de, card, "fr-1", "de-1", "de-2")
	if err := de.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := de.Launch(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	r.replaced(de)
	r.serves("de")

	// Adopted, but killed before the files were renamed.
	if err := de.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	crash()
	mark := r.logSize(de)
	if err := de.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.logged(de, mark, "the next hardware root is adopted")
	if err := de.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.serves("de")

	// The same with the old token gone.
	if err := de.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	crash()
	if err := os.RemoveAll(filepath.Join(de.Dir, "token")); err != nil {
		t.Fatal(err)
	}
	mark = r.logSize(de)
	if err := de.Start(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.logged(de, mark, "the next hardware root is adopted")
	if err := de.Ready(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.restart(de) // [device] names a dead token, root.json the other's
	r.logged(de, mark, "make it the [device]")
	r.serves("de")

	r.configure(de, func(c string) string { return c[:strings.Index(c, "[device]")] + "[device]\n" + table })
	r.restart(de)
	r.serves("de")
	for ring, version := range map[string]uint32{"coalition": 3, r.hard.name: 2} {
		r.hard.proven(r.rotate(ring, "data", version))
	}
	r.serves("de")
	r.provenReplacement(de)
}

// provenReplacement verifies the evidence of the proposal that gave a node its root.
func (r *rekeyed) provenReplacement(n *harness.Node) {
	r.t.Helper()
	all, err := r.client("fr", "operator").Proposals(r.t.Context(), wire.ProposalQuery{})
	if err != nil {
		r.t.Fatal(err)
	}
	for _, p := range all {
		if p.Content.Target == "node/"+n.ID {
			r.hard.proven(p)
			return
		}
	}
	r.t.Fatal("the proposal of the replacement is gone")
}

// TestRekeyFromDeadTPM gives jp an HSM in the place of a TPM that is dead before
// anybody approves: the node waits on the new device.
func TestRekeyFromDeadTPM(t *testing.T) {
	t.Parallel()
	r := newRekeyed(t)
	jp := r.c.Nodes["jp"]
	table := r.newToken(jp)
	r.configure(jp, func(c string) string {
		return strings.Replace(c, "path = \"unix:", "path = \"unix:/gone", 1) + "\n[next_device]\n" + table
	})
	card := r.prepare(jp)
	mark := r.logSize(jp)
	if err := jp.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := jp.Launch(); err != nil {
		t.Fatal(err)
	}
	r.logged(jp, mark, "waiting for the next hardware root")

	// A custodian of jp's own site has to be among them.
	done := r.proposeRoot(jp, card, "fr-1", "de-1", "jp-1")
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	r.replaced(jp)
	r.serves("jp")
	if n := r.node("jp-1"); !strings.Contains(n.Device, "SoftHSM") || n.Attested {
		t.Errorf("jp's device is said to be %q, attested %v", n.Device, n.Attested)
	}
	r.hard.proven(r.rotate("coalition", "data", 3))
	r.restart(jp)
	r.serves("jp")
	r.provenReplacement(jp)
}
