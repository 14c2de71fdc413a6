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

	raft "github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// disks are the data directories of all nodes as they once were.
type disks struct {
	*world
	old string
}

// keep stops all nodes, copies their data directories and starts them again.
func (d *disks) keep() {
	d.t.Helper()
	d.kill(d.c.All()...)
	d.old = d.t.TempDir()
	for _, n := range d.c.All() {
		d.do(copyTree(n.Data, filepath.Join(d.old, n.ID)))
	}
	d.start()
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

// start starts all nodes and waits until they are ready, and until jp's TPM has counted.
func (d *disks) start() {
	d.t.Helper()
	before := d.says("jp", "the device has counted")
	for _, n := range d.c.All() {
		d.do(n.Launch())
	}
	for _, n := range d.c.All() {
		d.do(n.Ready(d.t.Context()))
	}
	d.eventually(recovery, "jp's TPM has counted", func(context.Context) error {
		if d.says("jp", "the device has counted") == before {
			return errors.New("it has not")
		}
		return nil
	})
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

// backWithout starts the nodes given and checks that the one at the site, whose disk is
// from before the key was made, gives no answer until it knows the key again.
func (d *disks) backWithout(site, key string, launch ...*harness.Node) {
	d.t.Helper()
	n, told := d.c.Nodes[site], d.says(site, "is on probation")
	begin := time.Now()
	for _, m := range launch {
		d.do(m.Launch())
	}
	cl := d.once(site, "operator")
	tries := 0
	d.eventually(recovery, n.ID+" knows the key that its disk had forgotten", func(ctx context.Context) error {
		tries++
		_, err := cl.Key("coalition", key).Describe(ctx)
		if errors.Is(err, kms.NotFound) || errors.Is(err, kms.Denied) {
			return harness.Give(fmt.Errorf("%s answered from its old disk: %w", n.ID, err))
		}
		return err
	})
	if d.says(site, "is on probation") == told {
		d.t.Errorf("%s does not say that its disk was put back:\n%s", n.ID, n.Says(20))
	}
	for _, m := range launch {
		d.do(m.Ready(d.t.Context()))
	}
	d.t.Logf("%s is back %v after its start, %d questions before its first answer", n.ID, time.Since(begin).Round(time.Millisecond), tries-1)
}

// TestRollback puts older copies of data directories back: of one node under a running
// cluster, of one node while all are down, and of all.
func TestRollback(t *testing.T) {
	d := &disks{world: cluster(t)}
	de, jp := d.c.Nodes["de"], d.c.Nodes["jp"]
	fr := d.client("fr", "operator")
	d.keep()
	key := unique("after-the-copy")
	_, err := fr.CreateKey(t.Context(), "coalition", wire.CreateKeyRequest{Name: key, Purpose: string(kms.Encrypt)})
	d.do(err)
	_, _, err = d.c.SameLog(t.Context())
	d.do(err)

	d.kill(de)
	d.putBack(de)
	d.backWithout("de", key, de)

	d.kill(d.c.All()...)
	d.putBack(de)
	d.backWithout("de", key, d.c.All()...)

	// All: fr and de cannot know it. jp can.
	d.kill(d.c.All()...)
	d.putBack(d.c.All()...)
	for _, n := range d.c.All() {
		d.do(n.Launch())
	}
	for _, site := range []string{"fr", "de"} {
		d.do(d.c.Nodes[site].Ready(t.Context()))
	}
	d.eventually(recovery, "jp says why it is not ready", func(ctx context.Context) error {
		ready, err := d.once("jp", "operator").Ready(ctx) // an error unless it is ready
		why := strings.Join(ready.Reasons, "; ")
		switch {
		case ready.Ready:
			return harness.Give(errors.New("it is ready"))
		case !strings.Contains(why, "probation") || !strings.Contains(why, "recover"):
			return fmt.Errorf("it says %q, %v", why, err)
		}
		return nil
	})
	_, err = d.once("jp", "service").Key("coalition", key).Encrypt(t.Context(), wire.EncryptRequest{Plaintext: wire.Secret("x")})
	refused(t, "a data operation at the node whose TPM has counted further", err, kms.Unavailable)

	// The custodians approve: what cluster recovery does at the end.
	d.kill(jp)
	d.do(raft.AcceptRollback(filepath.Join(jp.Data, "raft")))
	d.do(jp.Start(t.Context()))
	_, _, err = d.c.SameLog(t.Context())
	d.do(err)
}
