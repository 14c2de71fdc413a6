package main

import (
	"log/slog"
	"time"
)

// stopLimit is how long a node may take to stop, its calls to disk and device included.
const stopLimit = time.Minute

// endIfStuck ends the process unless it is told before the limit that the node has
// stopped. A node that gives itself up because its disk hangs would otherwise stay, hanging
// as it closes its files, and nobody would start it anew.
func endIfStuck(limit time.Duration, log *slog.Logger, exit func(code int)) (stopped func()) {
	t := time.AfterFunc(limit, func() {
		log.Error("the node does not stop: a disk or device hangs; the process ends without waiting for it", "waited", limit)
		exit(1)
	})
	return func() { t.Stop() }
}
