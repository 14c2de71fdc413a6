package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"
)

// processes are the running nodes of a development cluster.
type processes struct {
	d       *dev
	running map[string]*process
}

type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
}

// startNodes starts one `conclaved run` for each site. For jp the TPM's socket
// is only known now, so its configuration is written first.
func (d *dev) startNodes() (*processes, error) {
	p := &processes{d: d, running: map[string]*process{}}
	for _, s := range d.sites {
		if err := p.start(s.id); err != nil {
			p.stop()
			return nil, err
		}
	}
	return p, nil
}

func (p *processes) logFile(site string) string { return p.d.path(site, "log") }

// start runs a node. The parent-death signal makes it die with this process; it
// is tied to the thread that forks, so that thread must live as long as we do.
func (p *processes) start(site string) error {
	self, err := executable()
	if err != nil {
		return err
	}
	log, err := os.OpenFile(p.logFile(site), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer log.Close() // the child has its own descriptor
	cmd := exec.Command(self, "run", "--config", p.d.path(site, "conclaved.toml"))
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	started := make(chan error)
	proc := &process{cmd: cmd, done: make(chan struct{})}
	go func() {
		runtime.LockOSThread() // for ever: the thread ends with this goroutine, after the child
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // its log says why it ended
			close(proc.done)
		}
	}()
	if err := <-started; err != nil {
		return fmt.Errorf("start node of %s: %w", site, err)
	}
	p.running[site] = proc
	return nil
}

func (p *processes) pid(site string) int { return p.running[site].cmd.Process.Pid }

func (p *processes) exited(site string) <-chan struct{} { return p.running[site].done }

// lastWords is the last line of a node's log.
func (p *processes) lastWords(site string) string {
	b, err := os.ReadFile(p.logFile(site))
	if err != nil {
		return err.Error()
	}
	lines := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	return string(lines[len(lines)-1])
}

// wait returns when ctx ends, or with an error when all nodes have ended. A
// single node that ends is only reported: whoever runs the cluster may have
// killed it on purpose.
func (p *processes) wait(ctx context.Context, out io.Writer) error {
	ended := make(chan string, len(p.running))
	for site, proc := range p.running {
		go func() {
			<-proc.done
			ended <- site
		}()
	}
	for range p.running {
		select {
		case <-ctx.Done():
			return nil
		case site := <-ended:
			if ctx.Err() == nil {
				fmt.Fprintf(out, "node %s-1 has ended; start it again with: conclaved run --config %s\n", site, p.d.path(site, "conclaved.toml"))
			}
		}
	}
	<-ctx.Done()
	return nil
}

// stop ends the nodes: politely, then after five seconds for good.
func (p *processes) stop() {
	for _, proc := range p.running {
		_ = proc.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	}
	limit := time.NewTimer(5 * time.Second)
	defer limit.Stop()
	for _, proc := range p.running {
		select {
		case <-proc.done:
		case <-limit.C:
			limit.Reset(0)
			if err := proc.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
				fmt.Fprintln(os.Stderr, "conclaved:", err)
			}
			<-proc.done
		}
	}
}
