package harness

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
)

// Plan says which nodes a coalition has.
type Plan struct {
	Nodes   map[string]int // how many at each site; all are voters, on SoftHSM tokens
	Cluster map[string]any // of the nodes' configuration: the table [cluster], beside its addresses
	Seed    uint64         // of the jitter of links

	// Program, optional, is the daemon that a node runs in place of Binaries.Conclaved.
	Program map[string]string
	// DataDir, optional, is called with a node's directory before the node is made and
	// returns where its data directory is to be.
	DataDir func(node, dir string) (string, error)
	// Direct leaves out the links: the nodes dial one another.
	Direct bool
}

// Coalition is a cluster of any number of nodes that this process has founded and
// runs by itself, with links between the nodes that can be disturbed. Unlike
// `conclaved dev` it has several nodes at a site.
type Coalition struct {
	Bin   Binaries
	Dir   string
	Nodes []*Node // sorted by id
	Links *Links

	plan        Plan
	authorities map[string]*authority // by site

	mu      sync.Mutex
	pids    map[int]string
	clients map[string]*client.Client
}

// Found makes CAs, custodians, tokens and the genesis document of a coalition in dir
// with the commands that operators use. It starts no node.
func Found(ctx context.Context, bin Binaries, dir string, plan Plan) (*Coalition, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	c := &Coalition{Bin: bin, Dir: dir, pids: map[int]string{}, clients: map[string]*client.Client{}}
	c.Links = NewLinks(c.processes, plan.Seed)
	if err := c.found(ctx, plan); err != nil {
		c.Links.Close()
		return nil, err
	}
	return c, nil
}

// processes names the nodes by their process ids.
func (c *Coalition) processes() map[int]string {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := make(map[int]string, len(c.pids))
	for pid, node := range c.pids {
		out[pid] = node
	}
	return out
}

// Launch starts a node and does not wait for it.
func (c *Coalition) Launch(n *Node) error {
	if err := n.Launch(); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	maps.DeleteFunc(c.pids, func(_ int, node string) bool { return node == n.ID })
	c.pids[n.PID()] = n.ID
	return nil
}

// Start starts every node that does not run and waits until all are ready.
func (c *Coalition) Start(ctx context.Context) error {
	for _, n := range c.Nodes {
		if !n.Running() {
			if err := c.Launch(n); err != nil {
				return err
			}
		}
	}
	for _, n := range c.Nodes {
		if err := n.Ready(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Stop ends all nodes and closes the links.
func (c *Coalition) Stop() error {
	var errs []error
	c.mu.Lock()
	for _, cl := range c.clients {
		cl.Close()
	}
	c.mu.Unlock()
	for _, n := range c.Nodes {
		if n.own != nil { // all at once
			_ = syscall.Kill(n.PID(), syscall.SIGCONT)
			_ = syscall.Kill(n.PID(), syscall.SIGTERM)
		}
	}
	for _, n := range c.Nodes {
		if n.own != nil && !n.own.end(syscall.SIGTERM, stopWait) {
			errs = append(errs, fmt.Errorf("%s did not end within %v of SIGTERM and was killed", n.ID, stopWait))
		}
	}
	c.Links.Close()
	return errors.Join(errs...)
}

// Node returns a node by its id.
func (c *Coalition) Node(id string) *Node {
	i := slices.IndexFunc(c.Nodes, func(n *Node) bool { return n.ID == id })
	if i < 0 {
		panic("no node " + id)
	}
	return c.Nodes[i]
}

// Between returns the links from every node of the one side to every node of the other.
func (c *Coalition) Between(from, to []*Node) []Link {
	var out []Link
	for _, a := range from {
		for _, b := range to {
			if a != b {
				out = append(out, Link{a.ID, b.ID})
			}
		}
	}
	return out
}

// Except returns all nodes but some.
func (c *Coalition) Except(some ...*Node) []*Node {
	return slices.DeleteFunc(slices.Clone(c.Nodes), func(n *Node) bool { return slices.Contains(some, n) })
}

// roles are the identities that every site's CA issues.
var roles = map[string]string{"operator": "operator/admin", "service": "service/load", "auditor": "auditor/check"}

// Config returns the configuration of a client of nodes with an identity of a site.
func (c *Coalition) Config(site, role string, nodes ...*Node) (client.Config, error) {
	base := filepath.Join(c.Dir, "clients", site+"-"+role)
	tlsConfig, err := client.LoadTLS(filepath.Join(c.Dir, "ca", "bundle.pem"), base+".crt", base+".key")
	if err != nil {
		return client.Config{}, err
	}
	cfg := client.Config{TLS: tlsConfig}
	for _, n := range nodes {
		cfg.Addresses = append(cfg.Addresses, n.API)
	}
	return cfg, nil
}

// Client returns a client that makes one try at one node, of at most the timeout. It
// is shared and closed with the coalition.
func (c *Coalition) Client(n *Node, role string, timeout time.Duration) (*client.Client, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	id := fmt.Sprint(n.ID, role, timeout)
	if cl, ok := c.clients[id]; ok {
		return cl, nil
	}
	cfg, err := c.Config(n.Site, role, n)
	if err != nil {
		return nil, err
	}
	cfg.Attempts, cfg.Timeout = 1, timeout
	cl, err := client.New(cfg)
	if err == nil {
		c.clients[id] = cl
	}
	return cl, err
}

// readiness returns what asks a node whether it is ready. The CAs are not all there
// yet when a node is placed, so the client is made at the first question.
func (c *Coalition) readiness(n *Node) func(context.Context) (wire.Ready, error) {
	return func(ctx context.Context) (wire.Ready, error) {
		cl, err := c.Client(n, "operator", 5*time.Second)
		if err != nil {
			return wire.Ready{}, err
		}
		return cl.Ready(ctx)
	}
}

// Custodian opens the key file of a custodian; the caller destroys the key.
func (c *Coalition) Custodian(id string) (*Custodian, error) {
	return openCustodian(id, filepath.Join(c.Dir, "custodians", id), filepath.Join(c.Dir, "custodians", id+".pass"))
}

// Status asks a node how the cluster looks from there.
func (c *Coalition) Status(ctx context.Context, n *Node) (wire.Status, error) {
	cl, err := c.Client(n, "operator", 2*time.Second)
	if err != nil {
		return wire.Status{}, err
	}
	return cl.Status(ctx)
}

// Leader returns the leader that a majority of all nodes names.
func (c *Coalition) Leader(ctx context.Context) (*Node, error) {
	var leader *Node
	err := Within(ctx, readyWait, "a leader that a majority follows", func(ctx context.Context) error {
		var votes sync.Map
		var wg sync.WaitGroup
		for _, n := range c.Nodes {
			if n.serving() {
				wg.Go(func() {
					if s, err := c.Status(ctx, n); err == nil && s.Raft != nil {
						votes.Store(n.ID, s.Raft.Leader)
					}
				})
			}
		}
		wg.Wait()
		count := map[string]int{}
		votes.Range(func(_, l any) bool { count[l.(string)]++; return true })
		for _, n := range c.Nodes {
			if 2*count[n.ID] > len(c.Nodes) && n.serving() {
				leader = n
				return nil
			}
		}
		return fmt.Errorf("the nodes name %v", count)
	})
	return leader, err
}

// SameLog waits until all nodes have applied the same cluster log and returns its size.
func (c *Coalition) SameLog(ctx context.Context) (size uint64, err error) {
	err = Within(ctx, 2*readyWait, "all nodes hold the same cluster log", func(ctx context.Context) error {
		byRoot := map[string]bool{}
		var seen []string
		for _, n := range c.Nodes {
			s, err := c.Status(ctx, n)
			if err != nil {
				return fmt.Errorf("%s: %w", n.ID, err)
			}
			size = s.LogSize
			byRoot[fmt.Sprintf("%d %x", s.LogSize, s.LogRoot)] = true
			seen = append(seen, fmt.Sprintf("%s: %d leaves, root %x", n.ID, s.LogSize, s.LogRoot[:4]))
		}
		if len(byRoot) != 1 {
			return errors.New(strings.Join(seen, "; "))
		}
		return nil
	})
	return size, err
}

// Logs returns the last lines of every node's log.
func (c *Coalition) Logs(lines int) string {
	var b strings.Builder
	for _, n := range c.Nodes {
		fmt.Fprintf(&b, "--- %s\n%s\n", n.ID, n.Says(lines))
	}
	return b.String()
}

// concat writes the contents of several files to one.
func concat(to string, from ...string) error {
	var all []byte
	for _, f := range from {
		b, err := os.ReadFile(f)
		if err != nil {
			return err
		}
		all = append(all, b...)
	}
	return os.WriteFile(to, all, 0o644)
}
