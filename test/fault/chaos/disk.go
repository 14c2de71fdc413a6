package chaos

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/conclave-kms/conclave/test/harness"
)

const (
	fullDisk  = "full disk"
	badSync   = "fsync fails"
	clockJump = "clock jump"

	diskSize = 512 << 20 // bytes; a node refuses changes below 256 MiB
)

// disk is a small file system of its own for a node's data, in memory.
type disk struct{ dir string }

// newDisk mounts a small tmpfs. It takes root.
func newDisk(dir string) (*disk, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	err := syscall.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d,mode=0700", diskSize))
	if err != nil {
		return nil, fmt.Errorf("mount a tmpfs: %w", err)
	}
	return &disk{dir}, nil
}

func (d *disk) unmount() error { return syscall.Unmount(d.dir, syscall.MNT_DETACH) }

func (d *disk) ballast() string { return filepath.Join(d.dir, "ballast") }

// fill leaves as many bytes free; with 0 not one.
func (d *disk) fill(leave uint64) error {
	var st syscall.Statfs_t
	if err := syscall.Statfs(d.dir, &st); err != nil {
		return err
	}
	free := st.Bavail * uint64(st.Bsize)
	f, err := os.OpenFile(d.ballast(), os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if free <= leave {
		return nil
	}
	err = syscall.Fallocate(int(f.Fd()), 0, 0, int64(free-leave))
	if leave == 0 && errors.Is(err, syscall.ENOSPC) {
		return nil // the node has written meanwhile: it is full
	}
	return err
}

// withDisks adds the fault of a disk that fills up, for the nodes that have one of
// their own. Every second time it is filled to the last byte. A node that does not
// work again soon after there is room is started anew, as its readiness asks for.
func (f *Faults) withDisks(disks map[string]*disk) {
	f.disks = disks
	if len(disks) > 0 {
		f.kinds = append(f.kinds, fault{kind: fullDisk, weight: 3, min: 1000 * ms, max: 8000 * ms, nodes: 1, strike: fillDisk})
	}
}

func fillDisk(_ context.Context, f *Faults, on []*harness.Node) (func(context.Context) error, error) {
	n := on[0]
	d := f.disks[n.ID]
	leave := uint64(128<<20) * uint64(f.number(2))
	repair := func(ctx context.Context) error {
		if err := os.Remove(d.ballast()); err != nil {
			return err
		}
		soon, cancel := context.WithTimeout(ctx, 4*time.Second)
		defer cancel()
		if n.Running() && n.Ready(soon) == nil {
			return nil
		}
		return f.anew(ctx, n)
	}
	if err := d.fill(leave); err != nil {
		return nil, errors.Join(err, repair(context.Background()))
	}
	return repair, nil
}

// anew starts a node anew, as its operator would.
func (f *Faults) anew(ctx context.Context, n *harness.Node) error {
	on := []*harness.Node{n}
	f.lay(true, on)
	defer f.lay(false, on)
	f.mu.Lock()
	f.restarted++
	f.mu.Unlock()
	return errors.Join(n.Kill(ctx), f.c.Launch(n))
}

// withStrace adds the fault of a disk whose fsync fails, made by strace(1) at the
// running process. A process whose fsync has failed must not go on as if its data were
// durable; afterwards it is started anew, as its operator would.
func (f *Faults) withStrace() error {
	if err := mayTrace(); err != nil {
		return err
	}
	f.kinds = append(f.kinds, fault{kind: badSync, weight: 3, min: 1000 * ms, max: 5000 * ms, nodes: 1, leader: true, strike: func(ctx context.Context, f *Faults, on []*harness.Node) (func(context.Context) error, error) {
		n := on[0]
		stop, err := inject(n, "fsync,fdatasync", "EIO")
		if err != nil {
			return nil, err
		}
		return func(ctx context.Context) error {
			return errors.Join(stop(), f.anew(ctx, n))
		}, nil
	}})
	return nil
}

// mayTrace tells why strace cannot be attached to a process that this one has started.
func mayTrace() error {
	if _, err := exec.LookPath("strace"); err != nil {
		return err
	}
	victim := exec.Command("cat")
	in, err := victim.StdinPipe()
	if err != nil {
		return err
	}
	if err := victim.Start(); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	trace := exec.CommandContext(ctx, "strace", "-qq", "-o", "/dev/null", "-p", strconv.Itoa(victim.Process.Pid), "-e", "trace=fsync", "-e", "inject=fsync:error=EIO")
	var said strings.Builder
	trace.Stderr = &said
	if err := trace.Start(); err != nil {
		return errors.Join(err, in.Close(), victim.Wait())
	}
	ended := make(chan error, 1)
	go func() { ended <- trace.Wait() }()
	err = harness.Within(ctx, 10*time.Second, "strace is attached", func(context.Context) error {
		select {
		case err := <-ended:
			ended <- err
			return harness.Give(fmt.Errorf("strace: %v: %s", err, strings.TrimSpace(said.String())))
		default:
		}
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", victim.Process.Pid))
		if err == nil && strings.Contains(string(b), "TracerPid:\t0\n") {
			err = errors.New("nobody traces the process")
		}
		return err
	})
	in.Close() // cat ends, and strace with it
	_ = victim.Wait()
	<-ended
	return err
}

// inject makes system calls of a node fail until stop.
func inject(n *harness.Node, calls, with string) (stop func() error, err error) {
	cmd := exec.Command("strace", "-f", "-qq", "-o", "/dev/null", "-p", strconv.Itoa(n.PID()), "-e", "trace="+calls, "-e", "inject="+calls+":error="+with)
	var said strings.Builder
	cmd.Stderr = &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	return func() error {
		_ = cmd.Process.Signal(syscall.SIGINT) // it lets go of the process
		err := cmd.Wait()
		var ended *exec.ExitError
		if errors.As(err, &ended) && ended.Sys().(syscall.WaitStatus).Signal() == syscall.SIGINT {
			return nil // as it was told, whatever it has said of processes that come and go
		}
		if n.Running() && err != nil && said.Len() > 0 {
			return fmt.Errorf("strace: %w: %s", err, said.String())
		}
		return nil
	}, nil
}

// withClocks adds the fault of a clock that is set wrong, for the nodes whose program
// takes the time with the offset in a file (clock.go).
func (f *Faults) withClocks(files map[string]string) {
	f.clocks = files
	f.kinds = append(f.kinds, fault{kind: clockJump, weight: 3, min: 1000 * ms, max: 10000 * ms, nodes: 1, strike: func(_ context.Context, f *Faults, on []*harness.Node) (func(context.Context) error, error) {
		file := f.clocks[on[0].ID]
		jumps := []time.Duration{-time.Hour, -5 * time.Minute, -5 * time.Second, 5 * time.Second, 5 * time.Minute, time.Hour}
		return func(context.Context) error { return setClock(file, 0) }, setClock(file, jumps[f.number(len(jumps))])
	}})
}
