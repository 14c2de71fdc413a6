package harness

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/conclave-kms/conclave/kms/wire"
)

// readyWait bounds a node's start, including the election that it may need.
const readyWait = 60 * time.Second

// Node is one node of a development cluster or of a coalition.
type Node struct {
	Site   string // fr, de or jp
	ID     string // fr-1
	API    string // https URL
	Dir    string // DIR/SITE
	Config string // DIR/SITE/conclaved.toml
	Data   string // data directory
	Log    string // standard error

	program string // conclaved
	found   string // its command that makes the hardware root and the card: init or join
	pid     atomic.Int64
	own     *process // once restarted by us
	tokens  softTokens
	check   func(context.Context) (wire.Ready, error)
}

// Use has the node run another program from its next start on.
func (n *Node) Use(conclaved string) { n.program = conclaved }

// PID returns the process id of the node.
func (n *Node) PID() int { return int(n.pid.Load()) }

// Process returns the node's process.
func (n *Node) Process() Process { return Process{n.ID, n.PID()} }

// Running reports whether the node's process exists.
func (n *Node) Running() bool { return n.Process().Running() }

// serving reports whether the node's process exists and is not frozen.
func (n *Node) serving() bool {
	s, err := processState(n.PID())
	return err == nil && s != 0 && s != 'Z' && s != 'X' && s != 'T'
}

// Kill ends the node with SIGKILL, as a power cut would, and waits for its end.
func (n *Node) Kill(ctx context.Context) error {
	return errors.Join(n.tokens.keep(n.Dir), n.Process().Kill(ctx), n.tokens.mend(n.Dir))
}

// Pause freezes the node with SIGSTOP and returns when it stands still.
func (n *Node) Pause(ctx context.Context) error { return n.Process().Pause(ctx) }

// Resume lets a frozen node go on.
func (n *Node) Resume() error { return n.Process().Resume() }

// Children lists the processes that the node has started.
func (n *Node) Children() ([]Process, error) {
	return Processes("a child of "+n.ID, func(parent int, _ string) bool { return parent == n.PID() })
}

// Restart kills the node if it runs, starts it again and waits until it is ready.
func (n *Node) Restart(ctx context.Context) error {
	if err := n.Kill(ctx); err != nil {
		return err
	}
	return n.Start(ctx)
}

// Says returns the last lines of the node's log.
func (n *Node) Says(lines int) string { return lastLines(n.Log, lines) }

// Start starts a node that was killed and returns when it is ready to serve.
func (n *Node) Start(ctx context.Context) error {
	if err := n.Launch(); err != nil {
		return err
	}
	return n.Ready(ctx)
}

// Launch starts a node that was killed, with `conclaved run` on its own
// configuration, and does not wait for it. Its log goes on in the same file.
func (n *Node) Launch() error {
	if n.Running() {
		return fmt.Errorf("%s runs already (process %d)", n.ID, n.PID())
	}
	log, err := os.OpenFile(n.Log, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close()
	if err := n.tokens.keep(n.Dir); err != nil {
		return err
	}
	cmd := exec.Command(n.program, "run", "--config", n.Config)
	cmd.Env = base().list()
	cmd.Dir = n.Dir
	cmd.Stdout, cmd.Stderr = log, log
	p, err := spawn(cmd)
	if err != nil {
		return err
	}
	n.own = p
	n.pid.Store(int64(p.pid))
	return nil
}

// Ready waits until the node says that it is ready to serve.
func (n *Node) Ready(ctx context.Context) error {
	return Within(ctx, readyWait, n.ID+" is ready", func(ctx context.Context) error {
		if !n.Running() {
			return Give(fmt.Errorf("the process has ended; its log says:\n%s", lastLines(n.Log, 10)))
		}
		r, err := n.check(ctx)
		if err == nil && !r.Ready {
			err = errors.New(strings.Join(r.Reasons, "; "))
		}
		return err
	})
}

// newNode describes the node of a site from the environment file.
func (c *Cluster) newNode(site string) (*Node, error) {
	upper := strings.ToUpper(site)
	n := &Node{Site: site, ID: site + "-1", program: c.Bin.Conclaved, Dir: filepath.Join(c.Dir, site), API: c.Vars["CONCLAVE_ADDR_"+upper]}
	n.Config, n.Data, n.Log = filepath.Join(n.Dir, "conclaved.toml"), filepath.Join(n.Dir, "data"), filepath.Join(n.Dir, "log")
	if n.API == "" {
		return nil, fmt.Errorf("%s lacks CONCLAVE_ADDR_%s", c.envFile(), upper)
	}
	var pid int64
	if _, err := fmt.Sscanf(c.Vars["CONCLAVE_PID_"+upper], "%d", &pid); err != nil || pid <= 1 {
		return nil, fmt.Errorf("%s: CONCLAVE_PID_%s is no process id", c.envFile(), upper)
	}
	n.pid.Store(pid)
	return n, nil
}
