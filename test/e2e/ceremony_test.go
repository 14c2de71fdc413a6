package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
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

// setRecovery has five custodians of three nations hold shares of a recovery key, of
// which three from two nations are needed, and waits until it opens something.
func (r *rekeyed) setRecovery(dir string) {
	r.t.Helper()
	args := []string{"recovery", "create", "berlin", "--residency", "de", "--threshold", "3", "--sites", "2", "--reason", "for a fire", "-o", "json"}
	for _, id := range []string{"fr-1", "fr-2", "de-1", "de-2", "jp-1"} {
		card := filepath.Join(dir, id+".card")
		r.cli(r.as(id, "recovery", "card", "--out", card)...)
		args = append(args, "--card", card)
	}
	var p wire.Proposal
	if err := json.Unmarshal([]byte(r.cli(args...).Stdout), &p); err != nil {
		r.t.Fatal(err)
	}
	if out := r.cli("proposal", "show", p.ID).Stdout; !strings.Contains(out, `"opens_all_keyrings_resident_at":["de"]`) || !strings.Contains(out, `"shares_needed":3,"sites_needed":2`) {
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

// TestRecoveryCeremony loses the only device of a residency, and brings its keys back to
// a new token with the shares of three custodians of two nations. Two of one nation are
// taken, and do not suffice.
func TestRecoveryCeremony(t *testing.T) {
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

	type outcome struct {
		res harness.Result
		err error
	}
	ran := make(chan outcome, 1)
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	go func() {
		res, err := r.c.CLI(ctx, r.c.EnvAs("fr", "fr"), "ceremony", "run", "berlin", "--dir", dir, "--reason", "the token of de burnt")
		ran <- outcome{res, err}
	}()
	document := filepath.Join(dir, "ceremony")
	err = harness.Within(t.Context(), 30*time.Second, "the ceremony begins", func(context.Context) error { _, err := os.Stat(document); return err })
	if err != nil {
		t.Fatal(err)
	}
	if out := r.cli("ceremony", "show", document).Stdout; !strings.Contains(out, "the token of de burnt") || !strings.Contains(out, de.ID) {
		t.Errorf("ceremony show: %s", out)
	}
	for _, id := range []string{"de-1", "de-2", "jp-1"} {
		r.cli(r.as(id, "ceremony", "contribute", document, "--out", filepath.Join(dir, id+".contribution"))...)
	}
	o := <-ran
	if o.err == nil {
		o.err = o.res.Err()
	}
	if o.err != nil {
		t.Fatal(o.err)
	}
	if !strings.Contains(o.res.Stderr, "missing: 2 of 3 shares, from 1 of 2 sites") || !strings.Contains(o.res.Stdout, "1 copies") {
		t.Errorf("ceremony run said %q and %q", o.res.Stderr, o.res.Stdout)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	r.replaced(de)
	r.decrypts("de", "berlin", "data", old, beforeRekey)
	r.decrypts("de", "berlin", "data", r.encrypt("de", "berlin", "data", "after"), "after")
	if out := r.cli("ceremony", "verify", filepath.Join(dir, "transcript.json")).Stdout; !strings.Contains(out, "jp-1, key SHA256:") || !strings.Contains(out, "keyring berlin") {
		t.Errorf("ceremony verify: %s", out)
	}
}
