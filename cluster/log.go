package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hashicorp/go-hclog"
)

// raftLogger passes Raft's log on to slog from level min upwards.
func raftLogger(log *slog.Logger, min slog.Level) hclog.Logger {
	l := hclog.NewInterceptLogger(&hclog.LoggerOptions{Name: "raft", Level: hclog.Off, Output: io.Discard})
	l.RegisterSink(&logSink{log: log, min: min, repeats: repeats{now: time.Now, seen: map[string]repeat{}}})
	return l
}

// logSink implements hclog.SinkAdapter.
type logSink struct {
	log     *slog.Logger
	min     slog.Level
	repeats repeats
}

// Accept implements hclog.SinkAdapter.
func (s *logSink) Accept(name string, level hclog.Level, msg string, args ...any) {
	l := slogLevel(level)
	if routine(msg, args) {
		l = slog.LevelDebug
	}
	if l < s.min || !s.log.Enabled(context.Background(), l) {
		return
	}
	write, left := s.repeats.note(msg, args)
	if !write {
		return
	}
	attrs := make([]any, 0, len(args)+4)
	attrs = append(attrs, "part", name)
	if left > 0 {
		attrs = append(attrs, "repeated", left)
	}
	for _, a := range args {
		if f, ok := a.(hclog.Format); ok && len(f) > 0 {
			if format, ok := f[0].(string); ok {
				a = fmt.Sprintf(format, f[1:]...)
			}
		}
		attrs = append(attrs, a)
	}
	s.log.Log(context.Background(), l, msg, attrs...)
}

func slogLevel(l hclog.Level) slog.Level {
	switch l {
	case hclog.Error:
		return slog.LevelError
	case hclog.Warn:
		return slog.LevelWarn
	case hclog.Info:
		return slog.LevelInfo
	}
	return slog.LevelDebug
}

// routine reports whether a message of Raft's is about a connection that ended, as
// all do when a node stops.
func routine(msg string, args []any) bool {
	if msg != "failed to decode incoming command" && msg != "failed to flush response" {
		return false
	}
	for _, a := range args {
		if err, ok := a.(error); ok && (errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.ECONNRESET)) {
			return true
		}
	}
	return false
}

// repeatEvery is the time between two lines of one failure. Raft tells of a peer
// that is down several times a second, for as long as it is down.
const repeatEvery = time.Minute

// repeats holds back failures that were just logged.
type repeats struct {
	now  func() time.Time
	mu   sync.Mutex
	seen map[string]repeat
}

type repeat struct {
	at   time.Time // when it was last written
	left int       // times it was left out since
}

// note reports whether a message is to be written, and how many like it were
// left out before. Only failures that concern a peer or have a cause are ever left out.
func (r *repeats) note(msg string, args []any) (write bool, left int) {
	if !strings.HasPrefix(msg, "failed to ") || len(args) == 0 {
		return true, 0
	}
	key := msg
	for i := 0; i+1 < len(args); i += 2 {
		switch args[i] {
		case "peer", "target", "server-id":
			key += fmt.Sprintf(" %v", args[i+1])
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.now()
	last, ok := r.seen[key]
	if ok && now.Sub(last.at) < repeatEvery {
		last.left++
		r.seen[key] = last
		return false, 0
	}
	r.seen[key] = repeat{at: now} // one for each message and node: few
	return true, last.left
}
