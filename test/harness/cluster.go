package harness

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
)

// The sites of a development cluster.
var sites = []string{"fr", "de", "jp"}

const (
	startWait = 2 * time.Minute
	stopWait  = 20 * time.Second
)

// Cluster is a running development cluster.
type Cluster struct {
	Bin   Binaries
	Dir   string
	Vars  Env              // of DIR/env
	Nodes map[string]*Node // by site
	Took  time.Duration    // from the start of the process to its line "ready"

	dev     *process
	devLog  string
	mu      sync.Mutex
	clients map[string]*client.Client
	after   []func() error // what to end when the nodes have ended
}

// Start runs `conclaved dev` in dir, which is made if missing, and returns when
// it has said that it is ready. keep goes on with what dir holds.
func Start(ctx context.Context, bin Binaries, dir string, keep bool) (*Cluster, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	c := &Cluster{Bin: bin, Dir: dir, devLog: dir + ".log"}
	if err := c.start(ctx, keep); err != nil {
		return nil, err
	}
	return c, nil
}

func (c *Cluster) start(ctx context.Context, keep bool) error {
	ctx, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	begin := time.Now()
	args := []string{"dev", "--dir", c.Dir}
	if keep {
		args = append(args, "--keep")
	}
	log, err := os.OpenFile(c.devLog, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	out, in, err := os.Pipe()
	if err != nil {
		return err
	}
	cmd := exec.Command(c.Bin.Conclaved, args...)
	cmd.Env = base().list()
	cmd.Stdout, cmd.Stderr = in, log
	c.dev, err = spawn(cmd)
	in.Close()
	if err != nil {
		out.Close()
		return err
	}
	ready := make(chan bool, 1)
	go func() { // reads to the end, so that the process never blocks on its output
		defer out.Close()
		for s := bufio.NewScanner(out); s.Scan(); {
			if strings.HasPrefix(s.Text(), "ready") {
				ready <- true
			}
		}
		ready <- false
	}()
	select {
	case ok := <-ready:
		if !ok {
			<-c.dev.done
			return fmt.Errorf("conclaved dev ended before it was ready (%v):\n%s", c.dev.err, lastLines(c.devLog, 20))
		}
	case <-ctx.Done():
		err := fmt.Errorf("conclaved dev is not ready after %v:\n%s\n%s", time.Since(begin).Round(time.Second), lastLines(c.devLog, 20), c.Logs(10))
		c.dev.end(syscall.SIGINT, stopWait)
		return err
	}
	c.Took = time.Since(begin)
	if err := c.load(); err != nil {
		return errors.Join(err, c.Stop())
	}
	return nil
}

func (c *Cluster) envFile() string { return filepath.Join(c.Dir, "env") }

// load reads DIR/env and makes the nodes and their clients.
func (c *Cluster) load() error {
	b, err := os.ReadFile(c.envFile())
	if err != nil {
		return err
	}
	if c.Vars, err = parseEnv(string(b)); err != nil {
		return fmt.Errorf("%s: %w", c.envFile(), err)
	}
	c.Nodes = map[string]*Node{}
	c.mu.Lock()
	c.clients = map[string]*client.Client{}
	c.mu.Unlock()
	for _, site := range sites {
		n, err := c.newNode(site)
		if err != nil {
			return err
		}
		cl, err := c.Client(site, "operator")
		if err != nil {
			return err
		}
		n.check = cl.Ready
		c.Nodes[site] = n
	}
	return nil
}

var exportLine = regexp.MustCompile(`^export ([A-Z][A-Z0-9_]*)='((?:[^']|'\\'')*)'$`)

// parseEnv reads lines "export NAME='value'", with the quote itself written '\”.
// Empty lines and comments are allowed.
func parseEnv(text string) (Env, error) {
	e := Env{}
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimSpace(line)
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		m := exportLine.FindStringSubmatch(line)
		if m == nil {
			return nil, fmt.Errorf("line %d is not export NAME='value'", i+1)
		}
		e[m[1]] = strings.ReplaceAll(m[2], `'\''`, `'`)
	}
	if len(e) == 0 {
		return nil, errors.New("no variable is exported")
	}
	return e, nil
}

// Stop ends the cluster with all its processes. The directory stays.
func (c *Cluster) Stop() error {
	var errs []error
	c.mu.Lock()
	for _, cl := range c.clients {
		cl.Close()
	}
	c.mu.Unlock()
	for _, n := range c.Nodes {
		if n.own != nil {
			n.own.end(syscall.SIGTERM, stopWait)
			n.own = nil
		}
	}
	if c.dev != nil {
		if !c.dev.end(syscall.SIGINT, stopWait) {
			errs = append(errs, fmt.Errorf("conclaved dev did not end within %v of SIGINT and was killed", stopWait))
		}
		c.dev = nil
	}
	for _, end := range c.after {
		errs = append(errs, end())
	}
	c.after = nil
	for _, n := range c.Nodes {
		if n.Running() {
			errs = append(errs, fmt.Errorf("conclaved dev left %s behind (process %d)", n.ID, n.PID()))
			_ = syscall.Kill(n.PID(), syscall.SIGKILL)
		}
	}
	return errors.Join(errs...)
}

// Restart stops the cluster and starts it again on the same directory.
func (c *Cluster) Restart(ctx context.Context) error {
	if err := c.Stop(); err != nil {
		return err
	}
	return c.start(ctx, true)
}

// Logs returns the last lines of every node's log and of the cluster's own.
func (c *Cluster) Logs(lines int) string {
	var b strings.Builder
	fmt.Fprintf(&b, "--- conclaved dev\n%s\n", lastLines(c.devLog, lines))
	for _, site := range sites {
		fmt.Fprintf(&b, "--- %s\n%s\n", site, lastLines(filepath.Join(c.Dir, site, "log"), lines))
	}
	return b.String()
}

// All returns the nodes in the order fr, de, jp.
func (c *Cluster) All() []*Node {
	out := make([]*Node, 0, len(sites))
	for _, s := range sites {
		out = append(out, c.Nodes[s])
	}
	return out
}

// Ready starts every node that does not run and waits until all are ready.
func (c *Cluster) Ready(ctx context.Context) error {
	for _, n := range c.All() {
		if !n.Running() {
			if err := n.Launch(); err != nil {
				return err
			}
		}
	}
	for _, n := range c.All() {
		if err := n.Ready(ctx); err != nil {
			return err
		}
	}
	return nil
}

// Status asks the node of a site how the cluster looks from there.
func (c *Cluster) Status(ctx context.Context, site string) (wire.Status, error) {
	cl, err := c.Client(site, "operator")
	if err != nil {
		return wire.Status{}, err
	}
	return cl.Status(ctx)
}

// Leader returns the leader that a majority of all nodes names. It is neither
// dead nor frozen.
func (c *Cluster) Leader(ctx context.Context) (*Node, error) {
	var leader *Node
	err := Within(ctx, readyWait, "a leader that a majority follows", func(ctx context.Context) error {
		votes := map[string]int{}
		for _, n := range c.All() {
			if !n.serving() {
				continue
			}
			ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
			s, err := c.Status(ctx, n.Site)
			cancel()
			if err == nil && s.Raft != nil {
				votes[s.Raft.Leader]++
			}
		}
		for _, n := range c.All() {
			if votes[n.ID] >= 2 && n.serving() {
				leader = n
				return nil
			}
		}
		return fmt.Errorf("the nodes name %v", votes)
	})
	return leader, err
}

// SameLog waits until every running node has applied the same cluster log, and
// returns its size and root.
func (c *Cluster) SameLog(ctx context.Context) (size uint64, root []byte, err error) {
	err = Within(ctx, readyWait, "all nodes hold the same cluster log", func(ctx context.Context) error {
		byRoot := map[string]bool{}
		var seen []string
		for _, n := range c.All() {
			if !n.Running() {
				continue
			}
			s, err := c.Status(ctx, n.Site)
			if err != nil {
				return err
			}
			size, root = s.LogSize, s.LogRoot
			byRoot[fmt.Sprintf("%d %x", s.LogSize, s.LogRoot)] = true
			seen = append(seen, fmt.Sprintf("%s: %d leaves, root %x", n.ID, s.LogSize, s.LogRoot))
		}
		if len(byRoot) != 1 {
			return errors.New(strings.Join(seen, "; "))
		}
		return nil
	})
	return size, root, err
}
