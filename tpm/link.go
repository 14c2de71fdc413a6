package tpm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

const (
	headerLen   = 10
	maxResponse = 4096
)

// A link carries one command at a time to the TPM. It is not safe for
// concurrent use. After an error the caller calls reset before the next open.
type link interface {
	// open makes the link ready for the commands of one call.
	open(deadline time.Time) error
	// exchange sends a command and returns the response, by the deadline.
	exchange(cmd []byte, deadline time.Time) ([]byte, error)
	// release ends a call.
	release()
	// reset gives up whatever is open, also a call that hangs.
	reset()
	// exclusive reports whether nobody else's objects can be in the TPM, so
	// that leftovers may be flushed.
	exclusive() bool
}

func newLink(path string) (link, error) {
	if p, ok := strings.CutPrefix(path, "unix:"); ok {
		return &unixLink{path: p}, nil
	}
	if !strings.HasPrefix(filepath.Base(path), "tpmrm") {
		return nil, invalid("%s is neither unix:SOCKET nor a resource manager device: use /dev/tpmrm0", path)
	}
	return &fileLink{path: path}, nil
}

// unixLink connects for every call, because a software TPM serves one
// connection at a time and other processes want their turn.
type unixLink struct {
	path string
	conn net.Conn
}

func (l *unixLink) open(deadline time.Time) error {
	d := net.Dialer{Deadline: deadline}
	for {
		conn, err := d.Dial("unix", l.path)
		if err == nil {
			l.conn = conn
			return nil
		}
		// The queue of connections is full of short ones: calls that ended
		// without a command.
		if !errors.Is(err, syscall.EAGAIN) || time.Until(deadline) < retryFirst {
			return err
		}
		time.Sleep(retryFirst)
	}
}

func (l *unixLink) exchange(cmd []byte, deadline time.Time) ([]byte, error) {
	if l.conn == nil {
		return nil, net.ErrClosed
	}
	if err := l.conn.SetDeadline(deadline); err != nil {
		return nil, err
	}
	if _, err := l.conn.Write(cmd); err != nil {
		return nil, err
	}
	hdr := make([]byte, headerLen)
	if _, err := io.ReadFull(l.conn, hdr); err != nil {
		return nil, err
	}
	size := binary.BigEndian.Uint32(hdr[2:])
	if size < headerLen || size > maxResponse {
		return nil, fmt.Errorf("response of %d bytes", size)
	}
	rsp := append(make([]byte, 0, size), hdr...)[:size]
	if _, err := io.ReadFull(l.conn, rsp[headerLen:]); err != nil {
		return nil, err
	}
	return rsp, nil
}

func (l *unixLink) release() { l.reset() }

func (l *unixLink) reset() {
	if l.conn != nil {
		l.conn.Close()
		l.conn = nil
	}
}

func (l *unixLink) exclusive() bool { return true }

// fileLink keeps the device open: closing it makes the resource manager flush
// everything that belongs to the descriptor.
type fileLink struct {
	path string
	f    *os.File
}

func (l *fileLink) open(time.Time) error {
	if l.f != nil {
		return nil
	}
	f, err := os.OpenFile(l.path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	fi, err := f.Stat()
	if err == nil && fi.Mode()&os.ModeCharDevice == 0 {
		err = errors.New(l.path + " is not a character device")
	}
	if err != nil {
		f.Close()
		return err
	}
	l.f = f
	return nil
}

// exchange runs the system calls in their own goroutine: a driver may block
// in them beyond any deadline, and then the descriptor is abandoned.
func (l *fileLink) exchange(cmd []byte, deadline time.Time) ([]byte, error) {
	f := l.f
	if f == nil {
		return nil, os.ErrClosed
	}
	type answer struct {
		rsp []byte
		err error
	}
	done := make(chan answer, 1)
	go func() {
		if _, err := f.Write(cmd); err != nil {
			done <- answer{nil, err}
			return
		}
		buf := make([]byte, maxResponse)
		n, err := f.Read(buf)
		done <- answer{buf[:n], err}
	}()
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case a := <-done:
		if a.err == nil {
			a.err = checkFrame(a.rsp)
		}
		return a.rsp, a.err
	case <-timer.C:
		l.reset()
		return nil, os.ErrDeadlineExceeded
	}
}

// checkFrame refuses a response whose stated length is not its length.
func checkFrame(rsp []byte) error {
	if len(rsp) < headerLen || int(binary.BigEndian.Uint32(rsp[2:])) != len(rsp) {
		return fmt.Errorf("truncated response of %d bytes", len(rsp))
	}
	return nil
}

func (l *fileLink) release() {}

func (l *fileLink) reset() {
	if f := l.f; f != nil {
		l.f = nil
		go f.Close() // may block as long as the driver does
	}
}

func (l *fileLink) exclusive() bool { return false }
