package tpm

import (
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
)

// answer makes a response with a return code and nothing else.
func answer(rc tpm2.TPMRC) []byte {
	b := make([]byte, headerLen)
	binary.BigEndian.PutUint16(b, 0x8001)
	binary.BigEndian.PutUint32(b[2:], headerLen)
	binary.BigEndian.PutUint32(b[6:], uint32(rc))
	return b
}

// scripted is a link that gives prepared answers; nil stands for an error, and
// the last answer repeats.
type scripted struct {
	answers [][]byte
	sent    int
}

func (l *scripted) open(time.Time) error { return nil }
func (l *scripted) release()             {}
func (l *scripted) reset()               {}
func (l *scripted) exclusive() bool      { return true }
func (l *scripted) exchange([]byte, time.Time) ([]byte, error) {
	a := l.answers[min(l.sent, len(l.answers)-1)]
	l.sent++
	if a == nil {
		return nil, io.ErrUnexpectedEOF
	}
	return append([]byte(nil), a...), nil
}

func TestRetry(t *testing.T) {
	ok := answer(tpm2.TPMRCSuccess)
	for name, c := range map[string]struct {
		answers [][]byte
		within  time.Duration
		sent    int // 0: more than one
		code    tpm2.TPMRC
		fails   bool
	}{
		"at once":            {[][]byte{ok}, time.Second, 1, tpm2.TPMRCSuccess, false},
		"put off":            {[][]byte{answer(tpm2.TPMRCRetry), answer(tpm2.TPMRCYielded), answer(tpm2.TPMRCTesting), answer(tpm2.TPMRCNVRate), ok}, 10 * time.Second, 5, tpm2.TPMRCSuccess, false},
		"put off for ever":   {[][]byte{answer(tpm2.TPMRCRetry)}, 30 * time.Millisecond, 0, tpm2.TPMRCRetry, false},
		"wrong auth":         {[][]byte{answer(tpm2.TPMRCAuthFail), ok}, time.Second, 1, tpm2.TPMRCAuthFail, false},
		"failed":             {[][]byte{nil, ok}, time.Second, 1, 0, true},
		"failed after retry": {[][]byte{answer(tpm2.TPMRCRetry), nil}, time.Second, 2, 0, true},
	} {
		l := &scripted{answers: c.answers}
		conn := &conn{link: l, deadline: time.Now().Add(c.within)}
		rsp, err := conn.Send([]byte{1})
		if c.fails {
			if !errors.Is(err, ErrUnavailable) {
				t.Errorf("%s: %v, want ErrUnavailable", name, err)
			}
			before := l.sent
			if _, err := conn.Send([]byte{1}); err == nil || l.sent != before {
				t.Errorf("%s: a failed connection was used again", name)
			}
		} else if err != nil || tpm2.TPMRC(binary.BigEndian.Uint32(rsp[6:])) != c.code {
			t.Errorf("%s: %x, %v", name, rsp, err)
		}
		if c.sent > 0 && l.sent != c.sent || c.sent == 0 && l.sent < 2 {
			t.Errorf("%s: sent %d times", name, l.sent)
		}
		conn.wipe()
	}
}

func TestClassify(t *testing.T) {
	for _, c := range []struct {
		err  error
		want error
	}{
		{tpm2.TPMRC(0x98e), ErrAuth},           // AUTH_FAIL, session 1
		{tpm2.TPMRC(0x9a2), ErrAuth},           // BAD_AUTH, session 1
		{tpm2.TPMRCLockout, ErrUnavailable},    //
		{tpm2.TPMRC(0x18b), ErrNotProvisioned}, // HANDLE, handle 1
		{tpm2.TPMRC(0x1e7), ErrInvalid},        // ECC_POINT, parameter 1
		{tpm2.TPMRCFailure, ErrUnavailable},
		{io.EOF, ErrUnavailable},
		{unsafe("x"), ErrUnsafe},
	} {
		if got := classify("op", c.err); !errors.Is(got, c.want) || !errors.Is(got, c.err) {
			t.Errorf("%v becomes %v, want %v", c.err, got, c.want)
		}
	}
	if classify("op", nil) != nil {
		t.Error("nil becomes an error")
	}
}

// fakeDevice is one end of a packet socket pair in place of a device file, and
// the other end for the test.
func fakeDevice(t *testing.T) (*fileLink, *os.File) {
	t.Helper()
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_SEQPACKET|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	far := os.NewFile(uintptr(fds[1]), "far end")
	t.Cleanup(func() { far.Close() })
	return &fileLink{path: "fake", f: os.NewFile(uintptr(fds[0]), "device")}, far
}

func TestFileLink(t *testing.T) {
	for name, c := range map[string]struct {
		response []byte
		fails    bool
	}{
		"whole":     {answer(tpm2.TPMRCSuccess), false},
		"short":     {[]byte{0x80, 1}, true},
		"truncated": {append([]byte{0x80, 1, 0, 0, 0, 20}, make([]byte, 10)...), true},
	} {
		l, far := fakeDevice(t)
		if _, err := far.Write(c.response); err != nil {
			t.Fatal(err)
		}
		_, err := l.exchange([]byte("command"), time.Now().Add(10*time.Second))
		if (err != nil) != c.fails {
			t.Errorf("%s: %v", name, err)
		}
		l.reset()
	}
}

// TestFileLinkHangs: a driver that blocks is left behind at the deadline.
func TestFileLinkHangs(t *testing.T) {
	l, far := fakeDevice(t)
	start := time.Now()
	_, err := l.exchange([]byte("command"), start.Add(50*time.Millisecond))
	if !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("hung device: %v", err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("hung device: %v", took)
	}
	if _, err := l.exchange([]byte("command"), time.Now().Add(time.Second)); !errors.Is(err, os.ErrClosed) {
		t.Errorf("abandoned device: %v", err)
	}
	// The driver answers at last: the goroutine left behind ends.
	if _, err := far.Write(answer(tpm2.TPMRCSuccess)); err != nil {
		t.Fatal(err)
	}
}

// TestUnixLinkFrames: a software TPM that answers nonsense is an error.
func TestUnixLinkFrames(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	ln, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	for name, response := range map[string][]byte{
		"nothing": {},
		"header":  {0x80, 1, 0, 0},
		"tiny":    {0x80, 1, 0, 0, 0, 9, 0, 0, 0, 0},
		"huge":    {0x80, 1, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0},
		"cut":     {0x80, 1, 0, 0, 0, 20, 0, 0, 0, 0, 1},
	} {
		served := make(chan struct{})
		go func() {
			defer close(served)
			conn, err := ln.Accept()
			if err != nil {
				return
			}
			defer conn.Close()
			_, _ = conn.Read(make([]byte, 7))
			_, _ = conn.Write(response)
		}()
		l := &unixLink{path: path}
		deadline := time.Now().Add(10 * time.Second)
		if err := l.open(deadline); err != nil {
			t.Fatal(err)
		}
		if _, err := l.exchange([]byte("command"), deadline); err == nil {
			t.Errorf("%s: no error", name)
		}
		l.release()
		<-served
	}
}

func TestLeftPad(t *testing.T) {
	dst := make([]byte, 3)
	for _, c := range []struct {
		in   []byte
		want [3]byte
		ok   bool
	}{
		{nil, [3]byte{}, true},
		{[]byte{1}, [3]byte{0, 0, 1}, true},
		{[]byte{1, 2, 3}, [3]byte{1, 2, 3}, true},
		{[]byte{0, 0, 1, 2, 3}, [3]byte{1, 2, 3}, true},
		{[]byte{1, 0, 0, 0}, [3]byte{}, false},
	} {
		copy(dst, "xyz")
		if ok := leftPad(dst, c.in); ok != c.ok || ok && [3]byte(dst) != c.want {
			t.Errorf("%x becomes %x, %v", c.in, dst, ok)
		}
	}
}
