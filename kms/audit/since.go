package audit

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms"
)

// ReadSince calls fn with the entries of the access log in dir whose time is at or after
// since, in order. It opens the segments alone that were written to since then, so it takes little
// time on a long log, and compares no root. It reports whether the log reaches back before
// since: else what was logged then may be elsewhere. It may run beside the node that writes the
// log. Errors as for Read.
func ReadSince(dir string, since time.Time, fn func(e Entry)) (reaches bool, err error) {
	names, err := accessKind.segments(dir)
	if err != nil {
		return false, err
	}
	for i, name := range names {
		path := filepath.Join(dir, name)
		fi, err := os.Stat(path)
		if err != nil {
			return false, kms.Wrap(kms.Unavailable, err, "the log file "+path+" cannot be read", "")
		}
		if fi.ModTime().Before(since) && i < len(names)-1 {
			reaches = true
			continue
		}
		first, err := strconv.ParseUint(strings.TrimSuffix(name, accessKind.suffix), 10, 64)
		if err != nil {
			return false, kms.Errorf(kms.Invalid, "%s is not the name of a segment", path)
		}
		err = accessKind.walkSegment(path, &tail{records: first}, func(header) error { return nil }, func(leaf []byte) error {
			e, err := ParseEntry(leaf)
			switch {
			case err != nil:
				return &damage{why: err.Error()}
			case e.Time < since.UnixMilli():
				reaches = true
			default:
				fn(e)
			}
			return nil
		})
		var d *damage
		if errors.As(err, &d) {
			if d.torn && i == len(names)-1 {
				return reaches, nil
			}
			return false, corrupt(d)
		}
		if err != nil {
			return false, err
		}
	}
	return reaches, nil
}
