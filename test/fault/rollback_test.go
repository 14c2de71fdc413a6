package fault

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
	"github.com/conclave-kms/conclave/kms/approval"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// disks are the data directories of all nodes as they once were.
type disks struct {
	*world
	old    string
	person harness.Env // an operator of fr who remembers what was seen

	made    string // key made since
	rotated string // key of which the old disks know version 1 alone, the cluster version 2
}

// keep stops all nodes, copies their data directories, and the tokens of fr and de, and
// starts them again.
func (d *disks) keep() {
	d.t.Helper()
	d.kill(d.c.All()...)
	d.old = d.t.TempDir()
	for _, n := range d.c.All() {
		d.do(copyTree(n.Data, filepath.Join(d.old, n.ID)))
	}
	for _, site := range []string{"fr", "de"} {
		d.do(copyTree(d.tokensOf(site), filepath.Join(d.old, site+"-tokens")))
	}
	d.start()
}

// putBackTokens gives fr and de, which do not run, their old tokens.
func (d *disks) putBackTokens() {
	d.t.Helper()
	for _, site := range []string{"fr", "de"} {
		d.do(os.RemoveAll(d.tokensOf(site)))
		d.do(copyTree(filepath.Join(d.old, site+"-tokens"), d.tokensOf(site)))
	}
}

func (d *disks) kill(nodes ...*harness.Node) {
	d.t.Helper()
	for _, n := range nodes {
		d.do(n.Kill(d.t.Context()))
	}
}

// putBack gives nodes that do not run their old data directories.
func (d *disks) putBack(nodes ...*harness.Node) {
	d.t.Helper()
	for _, n := range nodes {
		d.do(os.RemoveAll(n.Data))
		d.do(copyTree(filepath.Join(d.old, n.ID), n.Data))
	}
}

// start starts all nodes and waits until they are ready, and until their devices have counted.
func (d *disks) start() {
	d.t.Helper()
	before := d.counted()
	for _, n := range d.c.All() {
		d.do(n.Launch())
	}
	for _, n := range d.c.All() {
		d.do(n.Ready(d.t.Context()))
	}
	d.counts(before, d.c.All()...)
}

// counted says how often the sites' devices have counted.
func (d *disks) counted() map[string]int {
	d.t.Helper()
	times := map[string]int{}
	for _, n := range d.c.All() {
		times[n.Site] = d.says(n.Site, "the device has counted")
	}
	return times
}

// counts waits until the devices of nodes have counted again, which the others know then.
func (d *disks) counts(before map[string]int, nodes ...*harness.Node) {
	d.t.Helper()
	for _, n := range nodes {
		d.eventually(recovery, n.ID+"'s device has counted", func(context.Context) error {
			if d.says(n.Site, "the device has counted") == before[n.Site] {
				return errors.New("it has not")
			}
			return nil
		})
	}
}

// says counts the lines of a node's log with a text.
func (d *disks) says(site, text string) int {
	d.t.Helper()
	b, err := os.ReadFile(d.c.Nodes[site].Log)
	d.do(err)
	return strings.Count(string(b), text)
}

func copyTree(from, to string) error {
	return filepath.WalkDir(from, func(path string, e os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, path)
		if err != nil {
			return err
		}
		switch {
		case e.IsDir():
			return os.MkdirAll(filepath.Join(to, rel), 0o700)
		case e.Type().IsRegular():
			b, err := os.ReadFile(path)
			if err != nil {
				return err
			}
			return os.WriteFile(filepath.Join(to, rel), b, 0o600)
		}
		return fmt.Errorf("%s is neither directory nor file", path)
	})
}

// change makes what the old disks do not know.
func (d *disks) change() {
	d.t.Helper()
	d.made = unique("after-the-copy")
	_, err := d.client("fr", "operator").CreateKey(d.t.Context(), "coalition", wire.CreateKeyRequest{Name: d.made, Purpose: string(kms.Encrypt)})
	d.do(err)
	p := d.propose(d.rotated)
	for _, id := range []string{"fr-1", "de-1"} {
		d.run("conclave", "", d.approval(p, id)...)
	}
	for _, n := range d.c.All() {
		_, err := d.c.Activated(d.t.Context(), n.Site, "coalition", d.rotated, 2)
		d.do(err)
	}
	_, _, err = d.c.SameLog(d.t.Context())
	d.do(err)
}

func (d *disks) propose(key string) wire.Proposal {
	d.t.Helper()
	p, err := d.client("fr", "operator").OpenProposal(d.t.Context(), wire.OpenProposalRequest{
		Action: string(kms.ActionRotate), Target: approval.KeyTarget("coalition", key), Reason: "a rotation",
	})
	d.do(err)
	return p
}

// approval is the command with which a custodian approves a proposal.
func (d *disks) approval(p wire.Proposal, custodian string) []string {
	key, pass := d.c.CustodianFiles(custodian)
	return []string{"proposal", "approve", p.ID, "--custodian-key", key, "--pass-file", pass, "--yes"}
}

// run runs a command of ours, which must succeed, or say why not if words are given.
func (d *disks) run(program, words string, args ...string) {
	d.t.Helper()
	path, env := d.c.Bin.Conclave, d.person
	if program == "conclaved" {
		path, env = d.c.Bin.Conclaved, harness.Env{}
		for _, name := range []string{"PATH", "HOME", "TMPDIR", "SOFTHSM2_MODULE"} {
			env = env.With(name, os.Getenv(name))
		}
	}
	r, err := harness.Run(d.t.Context(), path, env, nil, args...)
	d.do(err)
	if (r.Code == 0) != (words == "") || !strings.Contains(r.Stderr, words) {
		d.t.Fatalf("%s %s: exit code %d, %q; wanted %q", program, strings.Join(args, " "), r.Code, r.Stderr, words)
	}
}

// asked are the questions put to a node whose disk was put back. Each may go unanswered, or
// be refused since the node is not available; an answer must not be that of the old disk.
type asked struct {
	site              string
	service, reader   *client.Client
	answered, refused int
}

func (d *disks) ask(site string) *asked {
	return &asked{site: site, service: d.once(site, "service"), reader: d.once(site, "operator")}
}

// again puts all questions once. The error is nil when all are answered.
func (d *disks) again(ctx context.Context, a *asked) error {
	old := func(err error) error {
		return harness.Give(fmt.Errorf("%s answered from its old disk: %w", a.site, err))
	}
	made := a.reader.Key("coalition", d.made)
	local := a.reader.LocalView().Key("coalition", d.made)
	e, sealing := a.service.Key("coalition", d.rotated).Encrypt(ctx, wire.EncryptRequest{Plaintext: wire.Secret("x")})
	if sealing == nil && e.KeyVersion != 2 {
		return old(fmt.Errorf("it encrypts under version %d", e.KeyVersion))
	}
	_, reading := made.Describe(ctx)
	_, looking := local.Describe(ctx)
	for _, err := range []error{sealing, reading, looking} {
		switch {
		case err == nil:
			a.answered++
		case errors.Is(err, kms.NotFound) || errors.Is(err, kms.Denied):
			return old(err)
		default:
			a.refused++
		}
	}
	return errors.Join(sealing, reading, looking)
}

// backWithout starts the nodes given and checks that the one at the site, whose disk is
// from before the changes, gives no answer until it knows them again.
func (d *disks) backWithout(site string, launch ...*harness.Node) {
	d.t.Helper()
	n, told, counted := d.c.Nodes[site], d.says(site, "is on probation"), d.counted()
	a := d.ask(site)
	begin := time.Now()
	for _, m := range launch {
		d.do(m.Launch())
	}
	d.eventually(recovery, n.ID+" knows what its disk had forgotten", func(ctx context.Context) error { return d.again(ctx, a) })
	if d.says(site, "is on probation") == told {
		d.t.Errorf("%s does not say that its disk was put back:\n%s", n.ID, n.Says(20))
	}
	for _, m := range launch {
		d.do(m.Ready(d.t.Context()))
	}
	d.counts(counted, launch...)
	d.t.Logf("%s is back %v after its start; before its first answer it refused %d questions", n.ID, time.Since(begin).Round(time.Millisecond), a.refused)
}

// TestRollback puts older copies of data directories back: of one node under a running
// cluster, of one node while all are down, and of all.
func TestRollback(t *testing.T) {
	d := &disks{world: cluster(t), rotated: unique("rotated")}
	d.person = d.c.Env("fr").With("CONCLAVE_MEMORY", filepath.Join(t.TempDir(), "memory"))
	de := d.c.Nodes["de"]
	_, err := d.client("fr", "operator").CreateKey(t.Context(), "coalition", wire.CreateKeyRequest{Name: d.rotated, Purpose: string(kms.Encrypt)})
	d.do(err)
	d.keep()
	d.change()

	d.kill(de)
	d.putBack(de)
	d.backWithout("de", de)

	d.kill(d.c.All()...)
	d.putBack(de)
	d.backWithout("de", d.c.All()...)

	d.kill(d.c.All()...)
	d.putBack(d.c.All()...)
	d.silent("fr", "de", "jp")

	d.kill(d.c.All()...)
	d.putBack(d.c.All()...)
	d.putBackTokens()
	d.tokensPutBack()
	d.recover()
}

// silent starts the nodes when all disks were put back, and checks that those of some sites,
// whose devices have counted further, answer nothing at all and say why.
func (d *disks) silent(sites ...string) {
	d.t.Helper()
	all := map[string]*asked{}
	for _, site := range sites {
		all[site] = d.ask(site)
	}
	for _, n := range d.c.All() {
		d.do(n.Launch())
	}
	for _, site := range sites {
		d.eventually(recovery, site+" says why it is not ready", func(ctx context.Context) error {
			for _, a := range all {
				if err := d.again(ctx, a); a.answered > 0 {
					return harness.Give(fmt.Errorf("%s answers %d times: %v", a.site, a.answered, err))
				}
			}
			ready, err := d.once(site, "operator").Ready(ctx) // an error unless it is ready
			why := strings.Join(ready.Reasons, "; ")
			switch {
			case ready.Ready:
				return harness.Give(errors.New("it is ready"))
			case !strings.Contains(why, "probation") || !strings.Contains(why, "recover"):
				return fmt.Errorf("it says %q, %v", why, err)
			}
			return nil
		})
	}
}

// tokensPutBack starts the nodes when the storage of the tokens was put back with all disks.
// jp's TPM has counted further: jp is silent. fr and de, whose tokens were put back too, go on;
// the custodians' command remembers, and signs nothing for them.
func (d *disks) tokensPutBack() {
	t := d.t
	t.Helper()
	jp := d.ask("jp")
	d.silent("jp")
	for _, site := range []string{"fr", "de"} {
		d.do(d.c.Nodes[site].Ready(t.Context()))
	}
	p := d.propose(d.rotated)
	d.run("conclave", "do not sign anything", d.approval(p, "fr-1")...)
	d.person["CONCLAVE_ADDR"] = d.c.API("de")
	d.run("conclave", "do not sign anything", d.approval(p, "fr-1")...)
	now, err := d.client("de", "operator").Proposal(t.Context(), p.ID)
	d.do(err)
	if len(now.Votes) != 0 {
		t.Errorf("the custodian has signed: %+v", now.Votes)
	}
	if err := d.again(t.Context(), jp); jp.answered > 0 {
		t.Errorf("jp answers %d times: %v", jp.answered, err)
	}
	// What the put-back nodes have done since contradicts what this person has seen. The
	// custodians agree to go on from it all the same.
	d.run("conclave", "", "memory", "accept", "--yes")
}

// recover takes the way back that custodians of two sites approve: from what fr holds.
func (d *disks) recover() {
	d.t.Helper()
	d.kill(d.c.All()...)
	dir, id := d.t.TempDir(), d.c.Vars["CONCLAVE_CLUSTER"]
	kept, statement := filepath.Join(dir, "backup"), filepath.Join(dir, "statement")
	config := func(n *harness.Node, args ...string) []string { return append(args, "--config", n.Config) }
	d.run("conclaved", "", config(d.c.Nodes["fr"], "backup", "--out", kept)...)
	d.run("conclave", "", "recover", "prepare", "--backup", kept, "--cluster", id, "--voters", "fr-1,de-1,jp-1", "--reason", "all disks were put back", "--out", statement)
	for _, n := range d.c.All() {
		d.run("conclaved", "needs", config(n, "recover", "--backup", kept, "--statement", statement, "--discard-newer")...)
	}
	for _, custodian := range []string{"fr-1", "fr-2", "de-1"} {
		key, pass := d.c.CustodianFiles(custodian)
		d.run("conclave", "", "recover", "approve", statement, "--backup", kept, "--cluster", id, "--custodian-key", key, "--pass-file", pass, "--yes")
	}
	for _, n := range d.c.All() {
		d.run("conclaved", "", config(n, "recover", "--backup", kept, "--statement", statement, "--discard-newer")...)
	}
	d.start()
	_, err := d.once("jp", "service").Key("coalition", d.rotated).Encrypt(d.t.Context(), wire.EncryptRequest{Plaintext: wire.Secret("x")})
	d.do(err)
	_, _, err = d.c.SameLog(d.t.Context())
	d.do(err)
}
