package child

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Descriptor is the number of the inherited descriptor over which a child process
// talks to the one that started it.
const Descriptor = 3

// process is a running child process.
type process struct {
	cmd    *exec.Cmd
	conn   *os.File // non-blocking
	exited chan struct{}
	err    error // of Wait, once exited is closed
}

// startProcess starts the command with one end of a socket pair as descriptor 3.
func startProcess(command []string, stderr *logWriter) (*process, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, unavailablef("socketpair: %v", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "child")
	defer theirs.Close()
	if err := unix.SetNonblock(fds[0], true); err != nil {
		_ = unix.Close(fds[0])
		return nil, unavailablef("%v", err)
	}
	p := &process{conn: os.NewFile(uintptr(fds[0]), "PKCS#11 process"), exited: make(chan struct{})}
	p.cmd = &exec.Cmd{Path: command[0], Args: command, Stderr: stderr, ExtraFiles: []*os.File{theirs},
		// What the library started may keep standard error open.
		WaitDelay:   time.Second,
		SysProcAttr: &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}}
	started := make(chan error)
	go func() {
		// The kernel sends the parent death signal when the thread ends that
		// started the process, so that thread stays as long as the process.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := p.cmd.Start()
		started <- err
		if err == nil {
			p.err = p.cmd.Wait()
			stderr.flush()
			close(p.exited)
		}
	}()
	if err := <-started; err != nil {
		p.conn.Close()
		return nil, unavailablef("start the PKCS#11 process: %v", err)
	}
	return p, nil
}

func (p *process) kill() { _ = p.cmd.Process.Kill() } // an error says that it has gone already

// hangUp tells the child that no more requests come: it finishes those under way.
func (p *process) hangUp() {
	if raw, err := p.conn.SyscallConn(); err == nil {
		_ = raw.Control(func(fd uintptr) { _ = unix.Shutdown(int(fd), unix.SHUT_WR) })
	}
}

// ending says in words how the process ended, once exited is closed.
func (p *process) ending() string {
	var exit *exec.ExitError
	if !errors.As(p.err, &exit) {
		if p.err != nil {
			return p.err.Error()
		}
		return "it ended by itself"
	}
	if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return fmt.Sprintf("it died of %s (%s)", unix.SignalName(ws.Signal()), ws.Signal())
	}
	return fmt.Sprintf("it ended with exit code %d", exit.ExitCode())
}

// tryWrite writes as much as goes without waiting and returns the rest.
func tryWrite(raw syscall.RawConn, b []byte) (rest []byte, err error) {
	var n int
	ctl := raw.Write(func(fd uintptr) bool {
		for len(b) > 0 {
			n, err = unix.Write(int(fd), b)
			if err == unix.EINTR {
				continue
			}
			if err != nil {
				break
			}
			b = b[n:]
		}
		if err == unix.EAGAIN {
			err = nil
		}
		return true
	})
	if err == nil {
		err = ctl
	}
	return b, err
}
