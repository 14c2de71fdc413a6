package child

import (
	"bytes"
	"log/slog"
	"sync"
	"time"
)

const (
	maxLine  = 500         // bytes of a line of standard error that are logged
	maxLines = 60          // lines that are logged in a period
	period   = time.Minute // of maxLines
)

// logWriter logs what a child process writes to standard error: line by line,
// printable characters only, and no more than maxLines in a period.
type logWriter struct {
	log *slog.Logger
	now func() time.Time

	mu    sync.Mutex
	line  []byte
	long  bool // the rest of the line is left out
	begun time.Time
	count int
}

// Write implements io.Writer. It never fails.
func (w *logWriter) Write(b []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n := len(b)
	for len(b) > 0 {
		part, rest, whole := bytes.Cut(b, []byte("\n"))
		b = rest
		if room := maxLine - len(w.line); len(part) > room {
			part, w.long = part[:room], true
		}
		w.line = append(w.line, part...)
		if whole {
			w.emit()
		}
	}
	return n, nil
}

// flush logs a last line without an end.
func (w *logWriter) flush() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(w.line) > 0 {
		w.emit()
	}
}

func (w *logWriter) emit() {
	line, long := printable(string(w.line), maxLine), w.long
	clear(w.line)
	w.line, w.long = w.line[:0], false
	if now := w.now(); now.Sub(w.begun) >= period {
		w.begun, w.count = now, 0
	}
	w.count++
	switch {
	case w.count < maxLines:
		if long {
			line += " [cut]"
		}
		w.log.Warn("PKCS#11 process", "stderr", line)
	case w.count == maxLines:
		w.log.Warn("PKCS#11 process writes too much: nothing more is logged of it for a while")
	}
}
