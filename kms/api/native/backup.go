package native

import (
	"context"
	"log/slog"
	"net/http"
	"reflect"
	"time"

	"github.com/conclave-kms/conclave/kms/engine"
)

// stream is an answer of bytes without a length.
type stream string

// backupRoute streams a backup. The status is sent before the file is complete; a
// file that is cut short lacks its trailer, and the connection ends without the
// last chunk.
func backupRoute() route {
	return route{method: http.MethodGet, pattern: "/v1/backup", id: "backup", summary: "A backup of the cluster's state, wrapped material only, signed by the node", response: reflect.TypeFor[stream](),
		serve: func(c *call) (any, error) {
			b, err := c.engine.Backup(c.Context(), c.caller)
			if err != nil {
				return nil, err
			}
			return backupAnswer{b, c.server.log}, nil
		}}
}

type backupAnswer struct {
	backup *engine.Backup
	log    *slog.Logger
}

// ServeHTTP implements http.Handler.
func (a backupAnswer) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Content-Type", "application/octet-stream")
	w.WriteHeader(http.StatusOK)
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	if err := a.backup.Write(ctx, &unhurried{w, http.NewResponseController(w)}); err != nil {
		a.log.Warn("a backup was not completed", "error", err)
		panic(http.ErrAbortHandler) // the client must not take it for whole
	}
}

// unhurried gives each piece of a long answer its own time.
type unhurried struct {
	w http.ResponseWriter
	c *http.ResponseController
}

// Write implements io.Writer.
func (u *unhurried) Write(b []byte) (int, error) {
	_ = u.c.SetWriteDeadline(time.Now().Add(RequestTimeout)) // not every connection has one
	return u.w.Write(b)
}
