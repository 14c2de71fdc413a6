package tamper

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/audit"
	"github.com/conclave-kms/conclave/kms/note"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
	"github.com/conclave-kms/conclave/kms/tlog"
)

// coalition is three sites with a node each that write real logs.
type coalition struct {
	t       *testing.T
	w       *statetest.World
	st      *state.State
	index   uint64
	now     int64
	cluster *audit.ClusterLog
	access  map[string]*audit.Log

	restarts string // the node whose access log begins anew with its next checkpoint
}

func newCoalition(t *testing.T) *coalition {
	c := &coalition{t: t, w: statetest.New(t, statetest.Options{}), now: statetest.Start, access: map[string]*audit.Log{}}
	c.st = c.w.State()
	c.w.Attach(c.propose, func() int64 { return c.now })
	var err error
	if c.cluster, err = audit.OpenClusterLog(filepath.Join(t.TempDir(), "cluster")); err != nil {
		t.Fatal(err)
	}
	for _, n := range c.st.Nodes() {
		if c.access[n.ID], err = audit.Open(filepath.Join(t.TempDir(), "access"), audit.Options{}); err != nil {
			t.Fatal(err)
		}
	}
	t.Cleanup(func() {
		for _, l := range c.access {
			if err := l.Close(); err != nil {
				t.Error(err)
			}
		}
		if err := c.cluster.Close(); err != nil {
			t.Error(err)
		}
	})
	return c
}

// propose applies a command as nodes do. Raft takes every seventh index for itself.
func (c *coalition) propose(raw []byte) (*state.State, state.Result) {
	if c.index++; c.index%7 == 0 {
		c.index++
	}
	next, r := c.st.Apply(c.index, raw)
	c.st = next
	if err := c.cluster.Append(c.index, raw, r.Leaf); err != nil {
		c.t.Fatal(err)
	}
	return next, r
}

// pass lets time pass.
func (c *coalition) pass(d time.Duration) {
	c.now += d.Milliseconds()
	for _, id := range c.w.NodeIDs() {
		c.w.Do(id, state.Tick{})
	}
}

// use writes n entries to a node's access log.
func (c *coalition) use(node string, n int) {
	c.t.Helper()
	site, _ := c.st.Node(node)
	errs := make(chan error, n)
	for i := range n {
		go func() {
			errs <- c.access[node].Append(context.Background(), audit.Entry{
				Time: c.now + int64(i), Node: node, Principal: c.w.Service(site.Site), Action: "decrypt", Resource: "ring/orders",
				Version: 1, Request: "req", Outcome: "ok", Context: map[string]string{"row": "7"}, Count: 1,
			})
		}()
	}
	for range n {
		if err := <-errs; err != nil {
			c.t.Fatal(err)
		}
	}
}

// checkpoints submits every node's checkpoint and has the others cosign it, then the
// cluster log.
func (c *coalition) checkpoints() {
	c.t.Helper()
	ids := c.w.NodeIDs()
	for _, id := range ids {
		if _, ok := c.st.Witness(id); !ok {
			c.w.Do(id, c.w.RegisterCommand(id))
		}
	}
	c.pass(time.Second)
	for _, id := range ids {
		if last, _ := c.st.Checkpoint(id); c.restarts != id && last.Size == c.access[id].Size() {
			continue
		}
		c.w.Do(id, c.submission(id))
		for _, other := range ids {
			if other != id {
				c.w.Do(other, c.w.CosignCommand(other, id))
			}
		}
	}
	head := c.head()
	for _, id := range ids {
		c.w.Do(id, c.w.SignedCosign(id, head))
	}
}

// head is the cluster log's, to be cosigned.
func (c *coalition) head() state.Cosign {
	hash := c.st.Hash()
	return state.Cosign{Log: note.ClusterLog, Size: c.st.LogSize(), Root: c.st.LogRoot(), State: hash[:]}
}

func (c *coalition) submission(node string) state.SubmitCheckpoint {
	c.t.Helper()
	log := c.access[node]
	last, _ := c.st.Checkpoint(node)
	if c.restarts == node {
		last, c.restarts = state.Checkpoint{Restart: last.Restart + 1}, ""
	}
	cmd := state.SubmitCheckpoint{Restart: last.Restart, Size: log.Size()}
	var err error
	if cmd.Root, err = tlog.Root(log, cmd.Size); err != nil {
		c.t.Fatal(err)
	}
	if last.Size > 0 {
		p, err := tlog.Consistency(log, last.Size, cmd.Size)
		if err != nil {
			c.t.Fatal(err)
		}
		cmd.Proofs = append(cmd.Proofs, state.LogProof{From: last.Size, Hashes: p})
	}
	return c.w.SignedCheckpoint(node, cmd)
}

// export brings the logs in a directory to the newest checkpoints.
func (c *coalition) export(dir string) {
	c.t.Helper()
	for _, log := range append([]string{note.ClusterLog}, c.accessLogs()...) {
		h, ok := audit.LatestHead(c.st, log)
		if !ok {
			c.t.Fatalf("%s has no checkpoint", log)
		}
		b, err := audit.SignedNote(c.st, h)
		if err != nil {
			c.t.Fatal(err)
		}
		if owner, access := audit.OwnerOf(log); access {
			err = c.access[owner].Export(c.t.Context(), dir, owner, b)
		} else {
			err = c.cluster.Export(c.t.Context(), dir, c.w.Signed().Marshal(), b)
		}
		if err != nil {
			c.t.Fatal(err)
		}
	}
}

func (c *coalition) accessLogs() (logs []string) {
	for _, id := range c.w.NodeIDs() {
		logs = append(logs, note.AccessLog(id))
	}
	return logs
}

// live lets the coalition work: exports are made when it begins, and at the end.
func (c *coalition) live(older, newer string) {
	c.w.CreateKeyring("ring", "de", "fr", "jp")
	c.w.CreateKey("ring", "orders", kms.Encrypt)
	c.w.GiveReceipts()
	for _, id := range c.w.NodeIDs() {
		c.use(id, 20)
	}
	c.use("node-fr-1", 250)
	c.checkpoints()
	c.export(older)
	c.pass(4 * time.Second)
	c.w.Rotate("ring", "orders")
	for _, id := range c.w.NodeIDs() {
		c.use(id, 30)
	}
	c.pass(5 * time.Second)
	c.checkpoints()
	c.export(newer)
}

// copyOf copies an export.
func copyOf(t *testing.T, dir string) string {
	t.Helper()
	out := t.TempDir()
	if err := os.CopyFS(out, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	return out
}
