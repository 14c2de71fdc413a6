package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/pqc"
	"github.com/conclave-kms/conclave/test/harness"
)

// newBerlin starts a cluster of its own with a keyring that is resident at de alone.
func newBerlin(t *testing.T) *rekeyed {
	t.Helper()
	bin := binaries(t)
	dir, err := os.MkdirTemp("", "conclave-ce") // short: it will hold a Unix socket
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
	r := &rekeyed{site: site{t, c}}
	de := r.client("de", "operator")
	if _, err := de.CreateKeyring(t.Context(), wire.CreateKeyringRequest{Name: "berlin", Residency: []string{"de"}, Policy: "keys"}); err != nil {
		t.Fatal(err)
	}
	if _, err := de.CreateKey(t.Context(), "berlin", wire.CreateKeyRequest{Name: "data", Purpose: string(kms.Encrypt)}); err != nil {
		t.Fatal(err)
	}
	return r
}

// cli runs the CLI as fr's operator and wants success.
func (r *rekeyed) cli(args ...string) harness.Result {
	r.t.Helper()
	res, err := r.c.CLI(r.t.Context(), r.c.EnvAs("fr", "fr"), args...)
	if err == nil {
		err = res.Err()
	}
	if err != nil {
		r.t.Fatalf("conclave %s: %v", strings.Join(args, " "), err)
	}
	return res
}

// as adds who a custodian is to a command's arguments.
func (r *rekeyed) as(id string, args ...string) []string {
	key, pass := r.c.CustodianFiles(id)
	return append(args, "--custodian", id, "--custodian-key", key, "--pass-file", pass)
}

// enrol makes a custodian more, by proposal.
func (r *rekeyed) enrol(id, site string) {
	r.t.Helper()
	key, pass := r.c.CustodianFiles(id)
	if err := os.WriteFile(pass, []byte("the passphrase of "+id+"\n"), 0o600); err != nil {
		r.t.Fatal(err)
	}
	r.cli("custodian", "keygen", "--out", key, "--pass-file", pass)
	custodian := r.custodian(id)
	public := custodian.Key.PublicKey()
	credential := approval.Credential{ID: pqc.Fingerprint(public), Suite: uint16(pqc.MLDSA65Ed25519), PublicKey: public}
	possession, err := custodian.Key.Sign(approval.CredentialCard(r.c.Vars["CONCLAVE_CLUSTER"], id, credential), []byte(approval.CredentialContext))
	if err != nil {
		r.t.Fatal(err)
	}
	p, err := r.client("fr", "operator").OpenProposal(r.t.Context(), wire.OpenProposalRequest{
		Action: string(kms.ActionCustodian), Target: "custodian/" + id, Reason: "a third one", Parameters: wire.ProposalParameters{
			Custodian:  &wire.Custodian{ID: id, Site: site, Credentials: []wire.Credential{{ID: credential.ID, Suite: credential.Suite, PublicKey: public}}},
			Possession: []wire.Possession{{Credential: credential.ID, Signature: possession}},
		},
	})
	if err != nil {
		r.t.Fatal(err)
	}
	for _, by := range []string{"fr-1", "de-1", "jp-1"} {
		r.approve(r.custodian(by), p)
	}
	err = harness.Within(r.t.Context(), 30*time.Second, id+" is a custodian", func(ctx context.Context) error {
		all, err := r.client("fr", "operator").Custodians(ctx)
		if err == nil && !slices.ContainsFunc(all, func(c wire.Custodian) bool { return c.ID == id }) {
			err = errors.New("not yet")
		}
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
}

// setRecovery has five custodians of two nations hold shares of a recovery key, of
// which three from two nations are needed, and waits until it opens something.
func (r *rekeyed) setRecovery(dir string) {
	r.t.Helper()
	r.enrol("de-3", "de")
	args := []string{"recovery", "create", "berlin", "--residency", "de", "--threshold", "3", "--sites", "2", "--reason", "for a fire", "-o", "json"}
	for _, id := range []string{"fr-1", "fr-2", "de-1", "de-2", "de-3"} {
		card := filepath.Join(dir, id+".card")
		r.cli(r.as(id, "recovery", "card", "--out", card)...)
		args = append(args, "--card", card)
	}
	var p wire.Proposal
	if err := json.Unmarshal([]byte(r.cli(args...).Stdout), &p); err != nil {
		r.t.Fatal(err)
	}
	if out := r.cli("proposal", "show", p.ID).Stdout; !strings.Contains(out, `opens_all_keyrings_resident_at = ["de"]`) || !strings.Contains(out, "shares_needed = 3\n") || !strings.Contains(out, "sites_needed = 2\n") {
		r.t.Errorf("custodians are shown %s", out)
	}
	for _, id := range []string{"fr-1", "de-1", "jp-1"} {
		r.approve(r.custodian(id), p)
	}
	err := harness.Within(r.t.Context(), 30*time.Second, "the recovery key opens berlin", func(ctx context.Context) error {
		keys, err := r.client("fr", "operator").RecoveryKeys(ctx)
		if err == nil && (len(keys) != 1 || len(keys[0].KEKs) != 1) {
			err = errors.New("nothing is sealed to it")
		}
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
	r.cli(r.as("fr-2", "recovery", "check", "berlin")...)
	wrong := r.as("fr-2", "recovery", "check", "berlin")
	wrong[4] = "fr-1" // with the key of fr-2
	res, err := r.c.CLI(r.t.Context(), r.c.EnvAs("fr", "fr"), wrong...)
	if err != nil || res.Err() == nil || !strings.Contains(res.Stderr, "does not open") {
		r.t.Errorf("another's share: %v, %q", err, res.Stderr)
	}
}

// ceremony is a run of the coordinator's command.
type ceremony struct {
	r    *rekeyed
	dir  string
	stop context.CancelFunc
	done chan struct{}
	res  harness.Result
	err  error

	mu   sync.Mutex
	said bytes.Buffer // by the coordinator, to people
}

// Write implements io.Writer.
func (c *ceremony) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.said.Write(b)
}

// begin has the coordinator begin a ceremony and waits for its document.
func (r *rekeyed) begin() *ceremony {
	r.t.Helper()
	ctx, stop := context.WithTimeout(r.t.Context(), 4*time.Minute)
	c := &ceremony{r: r, dir: filepath.Join(r.t.TempDir(), "ceremony"), stop: stop, done: make(chan struct{})}
	r.t.Cleanup(func() { stop(); <-c.done })
	go func() {
		defer close(c.done)
		c.res, c.err = harness.Watched(ctx, r.c.Bin.Conclave, r.c.EnvAs("fr", "fr"), nil, c, "ceremony", "run", "berlin", "--dir", c.dir, "--reason", "the token of de burnt")
	}()
	err := harness.Within(r.t.Context(), time.Minute, "the ceremony begins", func(context.Context) error { _, err := os.Stat(c.document()); return err })
	if err != nil {
		r.t.Fatal(err)
	}
	return c
}

func (c *ceremony) document() string { return filepath.Join(c.dir, "ceremony") }

func (c *ceremony) contribute(ids ...string) {
	c.r.t.Helper()
	for _, id := range ids {
		c.r.cli(c.r.as(id, "ceremony", "contribute", c.document(), "--yes", "--out", filepath.Join(c.dir, id+".contribution"))...)
	}
}

// misses waits until the coordinator, with the shares given so far, says what is missing.
func (c *ceremony) misses(what string) {
	c.r.t.Helper()
	err := harness.Within(c.r.t.Context(), time.Minute, "the coordinator misses "+what, func(context.Context) error {
		c.mu.Lock()
		defer c.mu.Unlock()
		if !strings.Contains(c.said.String(), "has contributed: "+what) {
			return fmt.Errorf("it says %q", c.said.String())
		}
		return nil
	})
	if err != nil {
		c.r.t.Fatal(err)
	}
}

// broughtNothing ends the ceremony and checks that nothing came of it.
func (c *ceremony) broughtNothing(de *harness.Node) {
	c.r.t.Helper()
	select {
	case <-c.done:
		c.r.t.Errorf("the ceremony is over: %v, %+v", c.err, c.res)
	default:
	}
	c.stop()
	<-c.done
	if _, err := os.Stat(filepath.Join(c.dir, "transcript.json")); !errors.Is(err, os.ErrNotExist) {
		c.r.t.Errorf("there is a transcript: %v", err)
	}
	if n := c.r.node(de.ID); n.Replacing == nil || n.Replacing.Missing != 1 {
		c.r.t.Errorf("%s is not where it was: %+v", de.ID, n.Replacing)
	}
}

// TestRecoveryCeremony loses the only device of a residency, and brings its keys back to
// a new token with the shares of three custodians of two nations. Three of one nation do
// not suffice, and neither do two of two.
func TestRecoveryCeremony(t *testing.T) {
	t.Parallel()
	r := newBerlin(t)
	dir := t.TempDir()
	old := r.encrypt("de", "berlin", "data", beforeRekey)
	r.setRecovery(dir)

	de := r.c.Nodes["de"]
	if err := de.Kill(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(de.Dir, "token")); err != nil {
		t.Fatal(err)
	}
	table := r.newToken(de)
	r.configure(de, func(c string) string { return c + "\n[next_device]\n" + table })
	card := r.prepare(de)
	mark := r.logSize(de)
	if err := de.Launch(); err != nil {
		t.Fatal(err)
	}
	r.logged(de, mark, "waiting for the next hardware root")
	done := r.proposeRoot(de, card, "fr-1", "de-1", "jp-1")
	err := harness.Within(t.Context(), 60*time.Second, "only berlin's KEK is missing", func(context.Context) error {
		if n := r.node(de.ID); n.Replacing == nil || n.Replacing.Missing != 1 {
			return errors.New("not yet")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}

	few := r.begin()
	few.contribute("de-1", "de-2", "de-3")
	few.misses("3 of 3 shares, from 1 of 2 sites")
	few.broughtNothing(de)
	c := r.begin()
	if out := r.cli("ceremony", "show", c.document()).Stdout; !strings.Contains(out, "the token of de burnt") || !strings.Contains(out, de.ID) {
		t.Errorf("ceremony show: %s", out)
	}
	c.contribute("de-1", "fr-2")
	c.misses("2 of 3 shares, from 2 of 2 sites")
	c.contribute("de-3")
	<-c.done
	if err := errors.Join(c.err, c.res.Err()); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(c.res.Stdout, "1 copies") {
		t.Errorf("ceremony run said %q", c.res.Stdout)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	r.replaced(de)
	r.decrypts("de", "berlin", "data", old, beforeRekey)
	r.decrypts("de", "berlin", "data", r.encrypt("de", "berlin", "data", "after"), "after")
	r.verifyOffline(c)
}

// verifyOffline verifies the transcript by a backup, with all nodes stopped, and an
// altered one, which is refused.
func (r *rekeyed) verifyOffline(c *ceremony) {
	r.t.Helper()
	transcript, kept, id := filepath.Join(c.dir, "transcript.json"), filepath.Join(c.dir, "backup"), r.c.Vars["CONCLAVE_CLUSTER"]
	r.cli("ceremony", "verify", transcript)
	r.cli("backup", "create", "--out", kept)
	for _, n := range r.c.All() {
		if err := n.Kill(r.t.Context()); err != nil {
			r.t.Fatal(err)
		}
	}
	out := r.cli("ceremony", "verify", transcript, "--backup", kept, "--cluster", id).Stdout
	for _, want := range []string{"de-3 of de, key SHA256:", "fr-2 of fr, key SHA256:", "3 custodians of 2 sites", "keyring berlin", "every statement in it verified"} {
		if !strings.Contains(out, want) {
			r.t.Errorf("ceremony verify does not say %q: %s", want, out)
		}
	}
	b, err := os.ReadFile(transcript)
	if err != nil {
		r.t.Fatal(err)
	}
	altered := filepath.Join(c.dir, "altered.json")
	if err := os.WriteFile(altered, bytes.Replace(b, []byte(`"version": 1`), []byte(`"version": 2`), 1), 0o600); err != nil {
		r.t.Fatal(err)
	}
	res, err := r.c.CLI(r.t.Context(), r.c.EnvAs("fr", "fr"), "ceremony", "verify", altered, "--backup", kept, "--cluster", id)
	if err != nil || res.Code == 0 || !strings.Contains(res.Stderr, "has not signed") {
		r.t.Errorf("an altered transcript: %v, exit code %d, %q", err, res.Code, res.Stderr)
	}
}
