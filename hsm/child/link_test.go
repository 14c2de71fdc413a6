package child

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/hsm"
	"golang.org/x/sys/unix"
)

// pair is a link and the other end of its connection.
func pair(t *testing.T, slots int, limit time.Duration) (*link, *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	conn, other := os.NewFile(uintptr(fds[0]), "parent"), os.NewFile(uintptr(fds[1]), "child")
	l, err := newLink(conn, slots, limit)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.start(func(err error) { l.fail(unavailablef("the link is gone: %v", err)) }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		other.Close()
		l.wg.Wait()
		conn.Close()
		l.mu.Lock()
		defer l.mu.Unlock()
		if l.users != 0 || l.slots[0].buf.Len() != 0 || l.w.buffers[0].Len() != 0 {
			t.Errorf("%d users are left, or the memory", l.users)
		}
	})
	return l, other
}

func nextRequest(t *testing.T, r *reader) message {
	t.Helper()
	frame, err := r.next()
	if err != nil {
		t.Error(err)
		return message{}
	}
	m, err := parse(bytes.Clone(frame))
	if err != nil {
		t.Error(err)
	}
	return m
}

func answer(t *testing.T, to *os.File, id uint64, parts ...[]byte) {
	t.Helper()
	m := request(opReply, 0, parts...)
	m.id = id
	if _, err := to.Write(frameOf(m)); err != nil {
		t.Error(err)
	}
}

// TestLinkOrder answers in the reverse order, with replies of all sizes.
func TestLinkOrder(t *testing.T) {
	const callers = 8
	l, other := pair(t, callers, time.Minute)
	var wg sync.WaitGroup
	for i := range callers {
		wg.Go(func() {
			want := bytes.Repeat([]byte{byte(i)}, i*i*1000)
			err := l.call(context.Background(), request(opSign, uint64(i), want), time.Minute, func(m message) error {
				if m.n != 1 || !bytes.Equal(m.parts[0], want) {
					t.Errorf("call %d got another reply", i)
				}
				return nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
	r, err := newReader(other)
	if err != nil {
		t.Fatal(err)
	}
	defer r.end()
	var requests []message
	for range callers {
		requests = append(requests, nextRequest(t, r))
	}
	for i := range requests {
		m := requests[len(requests)-1-i]
		answer(t, other, m.id, m.parts[0])
	}
	wg.Wait()
}

// TestLinkDeserted: the reply to a call whose caller has left does not reach another.
func TestLinkDeserted(t *testing.T) {
	l, other := pair(t, 1, time.Minute)
	r, err := newReader(other)
	if err != nil {
		t.Fatal(err)
	}
	defer r.end()
	ctx, cancel := context.WithCancel(context.Background())
	left := make(chan error)
	go func() { left <- l.call(ctx, request(opSign, 0), time.Minute, nil) }()
	first := nextRequest(t, r)
	cancel()
	if err := <-left; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	next := make(chan []byte)
	go func() {
		err := l.call(context.Background(), request(opSign, 0), time.Minute, func(m message) error {
			go func(b []byte) { next <- b }(bytes.Clone(m.parts[0]))
			return nil
		})
		if err != nil {
			t.Error(err)
		}
	}()
	answer(t, other, first.id, []byte("for the first"))
	answer(t, other, nextRequest(t, r).id, []byte("for the second"))
	if got := <-next; string(got) != "for the second" {
		t.Errorf("%q", got)
	}
}

// TestLinkOverdue: the deadline comes before the answer, and after the grace the
// other side counts as hung.
func TestLinkOverdue(t *testing.T) {
	l, other := pair(t, 2, 100*time.Millisecond)
	hung := make(chan string, 1)
	l.mu.Lock()
	l.hopeless = func(why string) { hung <- why }
	l.mu.Unlock()
	if err := l.call(context.Background(), request(opWrap, 0), 100*time.Millisecond, nil); !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), "no answer within") {
		t.Error(err)
	}
	if why := <-hung; !strings.Contains(why, "a call (wrap) hung") {
		t.Error(why)
	}
	r, err := newReader(other)
	if err != nil {
		t.Fatal(err)
	}
	defer r.end()
	late := nextRequest(t, r)
	answer(t, other, late.id, nil)
	done := make(chan error)
	go func() { done <- l.call(context.Background(), request(opWrap, 0), time.Minute, nil) }()
	answer(t, other, nextRequest(t, r).id, nil)
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestLinkSick: a device that fails for long, with no success in between, needs
// another process.
func TestLinkSick(t *testing.T) {
	l, other := pair(t, 1, time.Minute)
	given := make(chan string, 1)
	l.mu.Lock()
	l.hopeless = func(why string) { given <- why }
	l.mu.Unlock()
	r, err := newReader(other)
	if err != nil {
		t.Fatal(err)
	}
	defer r.end()
	call := func(reply message) {
		t.Helper()
		done := make(chan error)
		go func() { done <- l.call(context.Background(), request(opSign, 0), time.Minute, nil) }()
		reply.id = nextRequest(t, r).id
		if _, err := other.Write(frameOf(reply)); err != nil {
			t.Fatal(err)
		}
		if err := <-done; (err == nil) != (reply.arg == 0) {
			t.Fatal(err)
		}
	}
	failure := errorReply(unavailablef("the token has gone"))
	l.sickLimit = time.Hour
	call(failure)
	call(failure)
	l.sickLimit = 0
	call(request(opReply, 0))
	call(failure) // the first one
	call(errorReply(invalidf("a bad argument")))
	select {
	case why := <-given:
		t.Fatal(why)
	default:
	}
	call(failure)
	if why := <-given; !strings.Contains(why, "the device has failed for") {
		t.Error(why)
	}
}

// TestLinkRefuses: replies that answer nothing, or twice, end the connection.
func TestLinkRefuses(t *testing.T) {
	for name, reply := range map[string]func(id uint64) []byte{
		"another id":   func(id uint64) []byte { m := message{id: id + 1<<indexBits}; return frameOf(m) },
		"another slot": func(id uint64) []byte { m := message{id: id + 1}; return frameOf(m) },
		"not a frame":  func(uint64) []byte { return []byte{0, 0, 0, 1} },
		"a huge frame": func(uint64) []byte { return []byte{0xff, 0, 0, 1} },
	} {
		t.Run(name, func(t *testing.T) {
			l, other := pair(t, 1, time.Minute)
			done := make(chan error)
			go func() { done <- l.call(context.Background(), request(opSign, 0), time.Minute, nil) }()
			r, err := newReader(other)
			if err != nil {
				t.Fatal(err)
			}
			defer r.end()
			if _, err := other.Write(reply(nextRequest(t, r).id)); err != nil {
				t.Fatal(err)
			}
			if err := <-done; !errors.Is(err, hsm.ErrUnavailable) {
				t.Error(err)
			}
			if err := l.call(context.Background(), request(opSign, 0), time.Minute, nil); !errors.Is(err, hsm.ErrUnavailable) {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

func TestLogWriter(t *testing.T) {
	var out bytes.Buffer
	now := time.Unix(0, 0)
	w := &logWriter{log: slog.New(slog.NewTextHandler(&out, nil)), now: func() time.Time { return now }}
	write := func(s string) { _, _ = w.Write([]byte(s)) } // never fails
	write("one")
	write(" line\ntwo\x1b[2J\n" + strings.Repeat("x", 3*maxLine) + "\n")
	s := out.String()
	if !strings.Contains(s, `stderr="one line"`) || !strings.Contains(s, "two?[2J") || !strings.Contains(s, "[cut]") || strings.Count(s, "\n") != 3 || strings.Count(s, "x") > maxLine+20 {
		t.Error(s)
	}
	out.Reset()
	for range 2 * maxLines {
		write("again\n")
	}
	if n := strings.Count(out.String(), "again"); n != maxLines-4 || strings.Count(out.String(), "too much") != 1 {
		t.Errorf("%d lines: %s", n, out.String())
	}
	out.Reset()
	now = now.Add(period)
	write("later")
	w.flush()
	if !strings.Contains(out.String(), "later") {
		t.Error("nothing is logged any more")
	}
}

func TestDelay(t *testing.T) {
	var got []time.Duration
	for i := range 7 {
		got = append(got, delay(i))
	}
	for i, want := range []time.Duration{0, 1, 2, 4, 8, 10, 10} {
		if got[i] != want*time.Second {
			t.Errorf("after %d failures %v", i, got[i])
		}
	}
	if delay(1000) != maxDelay {
		t.Error(delay(1000))
	}
}
