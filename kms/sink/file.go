package sink

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"os"

	"github.com/conclave-kms/conclave/kms/audit"
)

// file appends entries to a file as lines of JSON. One that was moved away, as
// logrotate does, is made anew.
type file struct {
	path string
	f    *os.File
}

// File begins a sink that appends to a file (mode 0600) one line of JSON for each entry.
func File(path string, log *slog.Logger) (*Queue, error) {
	w := &file{path: path}
	if err := w.open(); err != nil {
		return nil, err
	}
	return start("file", w, log, queueLength, firstRetry), nil
}

func (w *file) open() error {
	if w.f != nil {
		there, err := os.Stat(w.path)
		if err == nil {
			own, err := w.f.Stat()
			if err == nil && os.SameFile(there, own) {
				return nil
			}
		}
		w.f.Close()
		w.f = nil
	}
	f, err := os.OpenFile(w.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		return err
	}
	w.f = f
	return nil
}

func (w *file) write(_ context.Context, entries []audit.Entry) (int, error) {
	if err := w.open(); err != nil {
		return 0, err
	}
	fi, err := w.f.Stat()
	if err != nil {
		return 0, err
	}
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	for _, e := range entries {
		if err := enc.Encode(e); err != nil {
			return 0, errors.Join(errRefused, err)
		}
	}
	if n, err := w.f.Write(b.Bytes()); err != nil {
		if n > 0 && fi.Mode().IsRegular() { // no half a line, and none twice
			err = errors.Join(err, w.f.Truncate(fi.Size()))
		}
		return 0, err
	}
	return 0, nil
}

func (w *file) close() error {
	if w.f == nil {
		return nil
	}
	return w.f.Close()
}
