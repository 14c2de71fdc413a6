package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// process is a program that this one started and that does not outlive it.
type process struct {
	pid  int
	done chan struct{}
	err  error // of Wait; set before done is closed
}

// spawn starts the command in a process group of its own, so that an interrupt
// at the terminal reaches it through its parent only. The parent-death signal is
// tied to the thread that forks, which therefore stays with the process.
func spawn(cmd *exec.Cmd) (*process, error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	p := &process{done: make(chan struct{})}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		p.err = cmd.Wait()
		close(p.done)
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	p.pid = cmd.Process.Pid
	return p, nil
}

// end asks the process to stop with the signal and kills it when it has not
// within the grace. It reports whether it stopped by itself.
func (p *process) end(sig syscall.Signal, grace time.Duration) bool {
	_ = syscall.Kill(p.pid, syscall.SIGCONT)
	_ = syscall.Kill(p.pid, sig)
	timer := time.NewTimer(grace)
	defer timer.Stop()
	select {
	case <-p.done:
		return true
	case <-timer.C:
	}
	_ = syscall.Kill(-p.pid, syscall.SIGKILL)
	<-p.done
	return false
}

// Process is a process that need not have been started by this one.
type Process struct {
	Name string // for people
	PID  int
}

// Running reports whether the process exists.
func (p Process) Running() bool {
	g, err := gone(p.PID)
	return err == nil && !g
}

// Kill ends the process with SIGKILL, as a power cut would, and waits for its end.
func (p Process) Kill(ctx context.Context) error {
	if err := syscall.Kill(p.PID, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("kill %s (process %d): %w", p.Name, p.PID, err)
	}
	return p.Ended(ctx)
}

// Ended waits until the process has ended, by itself or after a signal.
func (p Process) Ended(ctx context.Context) error {
	return Within(ctx, 20*time.Second, p.Name+" ends", func(context.Context) error {
		g, err := gone(p.PID)
		if err == nil && !g {
			err = errors.New("the process is still there")
		}
		return err
	})
}

// Pause freezes the process with SIGSTOP and returns when it stands still.
func (p Process) Pause(ctx context.Context) error {
	if err := syscall.Kill(p.PID, syscall.SIGSTOP); err != nil {
		return fmt.Errorf("stop %s (process %d): %w", p.Name, p.PID, err)
	}
	return Within(ctx, 5*time.Second, p.Name+" stands still", func(context.Context) error {
		s, err := processState(p.PID)
		if err == nil && s != 'T' {
			err = fmt.Errorf("its state is %q", s)
		}
		return err
	})
}

// Resume lets a frozen process go on.
func (p Process) Resume() error {
	if err := syscall.Kill(p.PID, syscall.SIGCONT); err != nil {
		return fmt.Errorf("continue %s (process %d): %w", p.Name, p.PID, err)
	}
	return nil
}

// Processes lists the processes whose command line, its words joined by spaces,
// match accepts.
func Processes(name string, match func(parent int, command string) bool) ([]Process, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	var out []Process
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		// A process that ends meanwhile has no files any more.
		words, err := os.ReadFile("/proc/" + e.Name() + "/cmdline")
		if err != nil || len(words) == 0 {
			continue
		}
		parent, ok := parentOf(pid)
		if ok && match(parent, strings.TrimRight(strings.ReplaceAll(string(words), "\x00", " "), " ")) {
			out = append(out, Process{name, pid})
		}
	}
	return out, nil
}

func parentOf(pid int) (int, bool) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	i := bytes.LastIndexByte(b, ')')
	if err != nil || i < 0 {
		return 0, false
	}
	fields := strings.Fields(string(b[i+1:]))
	if len(fields) < 2 {
		return 0, false
	}
	parent, err := strconv.Atoi(fields[1])
	return parent, err == nil
}

// processState returns the state letter of a process as in proc(5), 0 when there
// is none.
func processState(pid int) (byte, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	i := bytes.LastIndexByte(b, ')') // the name before it may hold anything
	if i < 0 || i+2 >= len(b) {
		return 0, fmt.Errorf("/proc/%d/stat is not understood", pid)
	}
	return b[i+2], nil
}

// gone reports whether the process has ended; its parent may not know yet.
func gone(pid int) (bool, error) {
	s, err := processState(pid)
	return s == 0 || s == 'Z' || s == 'X', err
}

// lastLines returns the last n lines of a file, a note when it cannot be read.
func lastLines(path string, n int) string {
	f, err := os.Open(path)
	if err != nil {
		return err.Error()
	}
	defer f.Close()
	const tail = 64 << 10
	if size, err := f.Seek(0, io.SeekEnd); err == nil {
		_, _ = f.Seek(max(0, size-tail), io.SeekStart)
	}
	b, err := io.ReadAll(f)
	if err != nil {
		return err.Error()
	}
	lines := strings.Split(strings.TrimRight(string(b), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
