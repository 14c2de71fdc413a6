// Package clustertest runs a whole cluster in one process for tests: the nodes of a
// statetest.World on loopback TLS, with certificates of their sites' CAs. Waiting is always for a condition with a deadline, never for time.
package clustertest

import (
	"bytes"
	"context"
	"crypto/tls"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/cluster"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/state"
	"github.com/conclave-kms/conclave/kms/state/statetest"
)

// Patience is how long the waiting functions wait before they fail the test.
const Patience = 60 * time.Second

// Options describe a cluster. The zero value is three sites, de, fr and jp, with
// a node each and timings for a test on loopback.
type Options struct {
	World  statetest.Options                   // Address, and Created if 0, are filled in
	Timing cluster.Timing                      // periods that are zero: those of Timing()
	Delays Delays                              // of what the members send to one another
	Change func(g *state.Genesis)              // changes the genesis before it is signed
	Config func(member int, c *cluster.Config) // changes a node's configuration at each start
	Logger func(member string) *slog.Logger    // nil: the test's log, warnings and worse
}

// Timing returns timings for a cluster on loopback. They are long enough that a
// busy machine with the race detector on does not lose its leader for no reason.
func Timing() cluster.Timing {
	return cluster.Timing{Heartbeat: 1600 * time.Millisecond, Election: 800 * time.Millisecond, Lease: 800 * time.Millisecond,
		Commit: 10 * time.Millisecond, RPC: 3 * time.Second, Propose: Patience}
}

// Member is a node of the cluster, running or not.
type Member struct {
	ID, Site    string
	Address     string // host:port
	Dir         string // data directory
	Certificate tls.Certificate
	Keys        *statetest.Node

	node     *cluster.Node
	listener net.Listener // for the first start
}

// Cluster is a set of members.
type Cluster struct {
	Members []*Member // sorted by id: node-SITE-1 and so on
	World   *statetest.World
	CAs     map[string]*CA // by site
	Genesis state.SignedGenesis

	t      testing.TB
	o      Options
	closed atomic.Bool

	network   *network
	dir       string                  // of the data directories
	listeners map[string]net.Listener // of new nodes, by id
}

// NodeURI returns the SPIFFE ID of a node.
func NodeURI(site, node string) string {
	return fmt.Sprintf("spiffe://%s/node/%s", statetest.TrustDomain(site), node)
}

// New founds a cluster and starts all its nodes. They are closed when the test ends.
func New(t testing.TB, o Options) *Cluster {
	t.Helper()
	c := Prepare(t, o)
	for i := range c.Members {
		c.Restart(i)
	}
	return c
}

// Prepare founds a cluster and starts nothing.
func Prepare(t testing.TB, o Options) *Cluster {
	t.Helper()
	c := &Cluster{t: t, o: o, CAs: map[string]*CA{}, network: &network{cut: map[string]bool{}, conns: map[*wire]struct{}{}}}
	c.listeners = map[string]net.Listener{}
	o.World.Address = func(node string) string {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		c.listeners[node] = ln
		return ln.Addr().String()
	}
	if o.World.Created == 0 {
		o.World.Created = time.Now().Add(-time.Hour).UnixMilli()
	}
	c.World = statetest.New(t, o.World)
	g := c.World.Genesis()
	if o.Change != nil {
		o.Change(&g)
	}
	c.Genesis = c.World.SignGenesis(g)
	for _, site := range g.Sites {
		ca := c.World.CA(site.ID)
		c.CAs[site.ID] = &CA{Certificate: ca.Certificate, key: ca.Key}
	}
	c.dir = t.TempDir()
	for _, n := range g.Nodes {
		c.Members = append(c.Members, &Member{ID: n.ID, Site: n.Site, Address: n.Address, Dir: filepath.Join(c.dir, n.ID),
			Certificate: c.CAs[n.Site].Issue(t, NodeURI(n.Site, n.ID)), Keys: c.World.Node(n.ID), listener: c.listeners[n.ID]})
	}
	c.network.delays = newDelays(o.Delays, c.Members)
	t.Cleanup(c.close)
	return c
}

func (c *Cluster) close() {
	for i, m := range c.Members {
		c.Kill(i)
		if m.listener != nil {
			_ = m.listener.Close()
		}
	}
	c.closed.Store(true)
}

// Config returns the configuration with which a member starts.
func (c *Cluster) Config(i int) cluster.Config {
	m := c.Members[i]
	cfg := cluster.Config{NodeID: m.ID, DataDir: m.Dir, Listen: m.Address, Listener: m.listener, Genesis: c.Genesis,
		Certificate: m.Certificate, Sign: m.Keys.Sign, Timing: c.timing(),
		Dial:      c.network.dialFrom(m.Address),
		FreeSpace: func(string) (uint64, uint64, error) { return 1 << 40, 1 << 40, nil }}
	c.introduce(m, &cfg)
	if d := c.network.delays; d != nil {
		ln, err := d.listen(m.Address, m.listener)
		if err != nil {
			c.t.Fatal(err)
		}
		cfg.Listener = ln
	}
	if c.o.Logger != nil {
		cfg.Logger = c.o.Logger(m.ID)
	} else {
		cfg.Logger = slog.New(slog.NewTextHandler(logWriter{c.t, &c.closed}, &slog.HandlerOptions{Level: slog.LevelWarn})).With("node", m.ID)
	}
	if c.o.Config != nil {
		c.o.Config(i, &cfg)
	}
	return cfg
}

// introduce completes the configuration of a member that is not in the genesis.
func (c *Cluster) introduce(m *Member, cfg *cluster.Config) {
	for _, n := range c.World.Genesis().Nodes {
		if n.ID == m.ID {
			return
		}
	}
	r := m.Keys.Record
	cfg.Site, cfg.SigningSuite, cfg.Signing = m.Site, r.SigningSuite, r.Signing
	st := c.World.State()
	cfg.Introduced = cluster.Introduction{Nodes: st.Nodes(), Sites: st.Sites()}
	if st.Epoch() > 0 {
		cfg.Introduced.Epoch, cfg.Introduced.Lineage = st.Epoch(), st.Lineage()
	}
}

// timing fills the periods that Options leaves open.
func (c *Cluster) timing() cluster.Timing {
	t, def := c.o.Timing, Timing()
	for _, f := range []struct{ at, def *time.Duration }{{&t.Heartbeat, &def.Heartbeat}, {&t.Election, &def.Election},
		{&t.Lease, &def.Lease}, {&t.Commit, &def.Commit}, {&t.RPC, &def.RPC}, {&t.Propose, &def.Propose}} {
		if *f.at == 0 {
			*f.at = *f.def
		}
	}
	return t
}

// Restart starts a member that is not running.
func (c *Cluster) Restart(i int) *cluster.Node {
	c.t.Helper()
	m := c.Members[i]
	if m.node != nil {
		c.t.Fatalf("node %s is running", m.ID)
	}
	n, err := cluster.Open(context.Background(), c.Config(i))
	m.listener = nil
	if err != nil {
		c.t.Fatalf("node %s does not start: %v", m.ID, err)
	}
	m.node = n
	return n
}

// Kill closes a member, if it runs. To the others it is as if it had died.
func (c *Cluster) Kill(i int) {
	c.t.Helper()
	m := c.Members[i]
	if m.node == nil {
		return
	}
	if err := m.node.Close(); err != nil {
		c.t.Errorf("node %s: %v", m.ID, err)
	}
	m.node = nil
}

// Node returns a running member.
func (c *Cluster) Node(i int) *cluster.Node {
	c.t.Helper()
	n := c.Members[i].node
	if n == nil {
		c.t.Fatalf("node %s is not running", c.Members[i].ID)
	}
	return n
}

// Running returns the indices of the running members.
func (c *Cluster) Running() []int {
	var l []int
	for i, m := range c.Members {
		if m.node != nil {
			l = append(l, i)
		}
	}
	return l
}

// Leader waits until a running member leads, with the assent of a majority, and
// returns its index.
func (c *Cluster) Leader() int {
	c.t.Helper()
	leader := -1
	c.Until("a leader", func() bool {
		for _, i := range c.Running() {
			if c.Members[i].node.Status().State == "leader" && c.Members[i].node.Fresh() < Patience {
				leader = i
				return true
			}
		}
		return false
	})
	return leader
}

// Follower returns the index of a running member that does not lead.
func (c *Cluster) Follower() int {
	c.t.Helper()
	leader := c.Leader()
	for _, i := range c.Running() {
		if i != leader {
			return i
		}
	}
	c.t.Fatal("there is no follower")
	return -1
}

// WaitApplied waits until all running members have applied the entry at index.
func (c *Cluster) WaitApplied(index uint64) {
	c.t.Helper()
	for _, i := range c.Running() {
		c.Wait(i, fmt.Sprintf("log entry %d", index), func(st *state.State) bool { return st.Index() >= index })
	}
}

// Wait waits until a member's state meets the condition.
func (c *Cluster) Wait(i int, what string, condition func(*state.State) bool) {
	c.t.Helper()
	n := c.Node(i)
	limit := time.After(Patience)
	for {
		changed := n.Changed()
		if condition(n.State()) {
			return
		}
		select {
		case <-changed:
		case <-limit:
			c.t.Fatalf("node %s: %s did not come within %v; it is at %+v", c.Members[i].ID, what, Patience, n.Status())
		}
	}
}

// Until waits until the condition holds, looking often.
func (c *Cluster) Until(what string, condition func() bool) {
	c.t.Helper()
	limit := time.After(Patience)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !condition() {
		select {
		case <-tick.C:
		case <-limit:
			for _, i := range c.Running() {
				c.t.Logf("%+v", c.Members[i].node.Status())
			}
			c.t.Fatalf("%s did not come within %v", what, Patience)
		}
	}
}

// Command returns a command signed by a member, for its own purposes. change,
// optional, is called on the envelope before it is signed.
func (c *Cluster) Command(i int, cmd state.Command, change func(*state.Envelope)) []byte {
	c.t.Helper()
	e := c.World.Envelope(c.Members[i].ID, cmd, statetest.At(time.Now().UnixMilli()))
	e.Cluster = c.ID()
	if change != nil {
		change(&e)
	}
	return c.Members[i].Keys.SignCommand(c.t, e.Marshal())
}

// Tick returns a signed tick of a member.
func (c *Cluster) Tick(i int) []byte {
	c.t.Helper()
	return c.Command(i, state.Tick{}, nil)
}

// Propose proposes a command at a member and fails the test unless it is applied.
func (c *Cluster) Propose(i int, raw []byte) state.Result {
	c.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), Patience)
	defer cancel()
	r, err := c.Node(i).Propose(ctx, raw)
	if err != nil {
		c.t.Fatalf("node %s: %v", c.Members[i].ID, err)
	}
	return r
}

// ID returns the cluster's identifier.
func (c *Cluster) ID() string { return kms.ClusterID(c.Genesis.Genesis) }

// SameState waits until all running members have applied index, and fails the
// test unless their states hash alike.
func (c *Cluster) SameState(index uint64) {
	c.t.Helper()
	c.SameStateOf(index, c.Running()...)
}

// SameStateOf is SameState of some running members.
func (c *Cluster) SameStateOf(index uint64, members ...int) {
	c.t.Helper()
	var first [32]byte
	for k, i := range members {
		c.Wait(i, fmt.Sprintf("log entry %d", index), func(st *state.State) bool { return st.Index() >= index })
		st := c.Node(i).State()
		if st.Index() != index {
			c.t.Fatalf("node %s is at %d, beyond %d: commands are still under way", c.Members[i].ID, st.Index(), index)
		}
		if k == 0 {
			first = st.Hash()
		} else if st.Hash() != first {
			c.t.Fatalf("the state of node %s at %d differs", c.Members[i].ID, index)
		}
	}
}

// logWriter writes to the test's log until the cluster is closed.
type logWriter struct {
	t      testing.TB
	closed *atomic.Bool
}

// Write implements io.Writer.
func (w logWriter) Write(b []byte) (int, error) {
	if !w.closed.Load() {
		w.t.Logf("%s", bytes.TrimSpace(b))
	}
	return len(b), nil
}
