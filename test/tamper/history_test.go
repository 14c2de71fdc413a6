package tamper

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/note"
	"github.com/conclave-kms/conclave/kms/state"
)

// goOn has the cluster go on in another epoch, from the state where it is.
func (c *coalition) goOn() {
	c.t.Helper()
	approved := c.w.Recover(c.st, c.w.NodeIDs()...)
	next, err := c.st.Recover(approved)
	if err != nil {
		c.t.Fatal(err)
	}
	c.index, c.now = next.Index(), max(c.now, next.Clock())
	if err := c.cluster.Append(c.index, approved, state.RecoveryLeaf(c.index, next.Clock(), approved)); err != nil {
		c.t.Fatal(err)
	}
	c.st = next
	c.w.SetState(next)
}

// TestHistory: a coalition whose node has another hardware root, that has gone on from a
// backup, and where one node has lost its access log with that, verifies; and who has
// seen the logs before sees them go on.
func TestHistory(t *testing.T) {
	c := newCoalition(t)
	c.live(filepath.Join(t.TempDir(), "older"), filepath.Join(t.TempDir(), "newer"))
	c.w.Rekey(stolen)
	c.use(stolen, 3)
	c.checkpoints()
	rekeyed := filepath.Join(t.TempDir(), "rekeyed")
	c.export(rekeyed)
	before, err := verify(t, c, rekeyed, nil)
	if err != nil || before.Tail != 0 {
		t.Fatalf("after another root: %v: %+v", err, before)
	}

	c.pass(time.Second)
	c.goOn()
	c.export(rekeyed) // whose checkpoints are those of before
	if again, err := verify(t, c, rekeyed, before.Seen); err != nil || again.Tail != 0 {
		t.Fatalf("before the first checkpoint of the epoch: %v: %+v", err, again)
	}
	c.pass(time.Second)
	lost, err := audit.Open(filepath.Join(t.TempDir(), "access"), audit.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lost.Close() })
	c.access["node-jp-1"].Close()
	c.access["node-jp-1"] = lost
	c.restarts = "node-jp-1"
	for _, id := range c.w.NodeIDs() {
		c.use(id, 4)
	}
	c.checkpoints()
	recovered := filepath.Join(t.TempDir(), "recovered")
	c.export(recovered)
	r, err := verify(t, c, recovered, before.Seen)
	if err != nil || r.Epoch != 1 || r.Tail != 0 {
		t.Fatalf("after a recovery: %v: %+v", err, r)
	}
	if len(r.Notes) != 1 || !strings.Contains(r.Notes[0], "access/node-jp-1 has begun anew") {
		t.Errorf("notes %q", r.Notes)
	}
	for _, l := range r.Logs {
		if l.Log == note.AccessLog("node-jp-1") && (l.Restart != 1 || l.Size != 4) {
			t.Errorf("%+v", l)
		}
	}
	if _, err := verify(t, c, rekeyed, r.Seen); err == nil {
		t.Error("what was before the recovery passes for the newest")
	}
}
