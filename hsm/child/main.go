package child

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Main is the child process: it opens the device that the parent names on descriptor
// 3 and answers its requests until the parent hangs up or dies. Nothing else may
// have used descriptor 3. The process has no core dumps, its memory is closed to
// other processes of the user, and a fatal signal ends it at once, without a trace
// that would put registers on standard error.
func Main() error {
	if err := harden(); err != nil {
		return err
	}
	conn := os.NewFile(Descriptor, "parent")
	if conn == nil {
		return errNoParent
	}
	if st, err := conn.Stat(); err != nil || st.Mode()&os.ModeSocket == 0 {
		return errNoParent
	}
	unix.CloseOnExec(Descriptor) // not for what the library may start
	return serve(conn)
}

var errNoParent = errors.New("descriptor 3 is not a socket: this command is started by conclaved itself, see device.isolate in its configuration")

func harden() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("disable core dumps: %w", err)
	}
	_ = os.WriteFile("/proc/self/comm", []byte("conclaved-hsm"), 0) // for ps and top; a help only
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("close the memory to other processes: %w", err)
	}
	// The parent decides when this process ends. A terminal and a service manager
	// send these to both.
	signal.Ignore(unix.SIGINT, unix.SIGTERM, unix.SIGHUP)
	for _, s := range []syscall.Signal{unix.SIGSEGV, unix.SIGBUS, unix.SIGFPE, unix.SIGILL, unix.SIGABRT, unix.SIGTRAP, unix.SIGSYS, unix.SIGQUIT} {
		if err := defaultAction(s); err != nil {
			return fmt.Errorf("signal %v: %w", s, err)
		}
	}
	// A processor that is in a device call for long is given to others only after a
	// while: one more, so that requests are read meanwhile.
	runtime.GOMAXPROCS(runtime.GOMAXPROCS(0) + 1)
	debug.SetGCPercent(800) // the live heap is a few MiB: collect less often
	debug.SetMemoryLimit(64 << 20)
	return nil
}

// defaultAction takes a signal away from the Go runtime, whose handler would print
// registers and stacks.
func defaultAction(s syscall.Signal) error {
	var action [4]uintptr // struct sigaction of the kernel: SIG_DFL, no flags, no restorer, empty mask
	_, _, errno := unix.RawSyscall6(unix.SYS_RT_SIGACTION, uintptr(s), uintptr(unsafe.Pointer(&action)), 0, 8, 0, 0)
	if errno != 0 {
		return errno
	}
	return nil
}
