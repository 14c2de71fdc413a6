package cluster

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"testing"
	"time"
)

// A peer that is down is told of once a minute, with the number of lines left out;
// other peers and other messages are not held back.
func TestRepeats(t *testing.T) {
	now := time.Unix(0, 0)
	r := repeats{now: func() time.Time { return now }, seen: map[string]repeat{}}
	down := errors.New("connection refused")
	for i, c := range []struct {
		after time.Duration
		msg   string
		args  []any
		write bool
		left  int
	}{
		{0, "failed to heartbeat to", []any{"peer", "a", "error", down}, true, 0},
		{time.Second, "failed to heartbeat to", []any{"peer", "a", "error", down}, false, 0},
		{time.Second, "failed to heartbeat to", []any{"peer", "b", "error", down}, true, 0},
		{time.Second, "failed to contact", []any{"server-id", "a"}, true, 0},
		{time.Second, "failed to heartbeat to", []any{"peer", "a", "error", down}, false, 0},
		{repeatEvery, "failed to heartbeat to", []any{"peer", "a", "error", down}, true, 2},
		{0, "failed to contact quorum of nodes, stepping down", nil, true, 0},
		{0, "failed to contact quorum of nodes, stepping down", nil, true, 0},
		{0, "entering leader state", []any{"leader", "a"}, true, 0},
		{0, "entering leader state", []any{"leader", "a"}, true, 0},
	} {
		now = now.Add(c.after)
		if write, left := r.note(c.msg, c.args); write != c.write || left != c.left {
			t.Errorf("%d: %q: %v, %d; want %v, %d", i, c.msg, write, left, c.write, c.left)
		}
	}
}

// Connections that end with the node are no errors.
func TestRoutineLines(t *testing.T) {
	var seen lines
	l := raftLogger(slog.New(&seen), slog.LevelWarn)
	l.Error("failed to decode incoming command", "error", &net.OpError{Op: "read", Err: net.ErrClosed})
	l.Error("failed to decode incoming command", "error", errors.New("no such message"))
	if len(seen) != 1 {
		t.Errorf("%d lines: %v", len(seen), seen)
	}
}

// lines is a slog.Handler that keeps the messages.
type lines []string

func (*lines) Enabled(context.Context, slog.Level) bool { return true }
func (l *lines) Handle(_ context.Context, r slog.Record) error {
	*l = append(*l, r.Message)
	return nil
}
func (l *lines) WithAttrs([]slog.Attr) slog.Handler { return l }
func (l *lines) WithGroup(string) slog.Handler      { return l }
