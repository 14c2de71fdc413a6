package chaos

import (
	"os"
	"strconv"
	"time"

	"github.com/conclave-kms/conclave/test/harness"
)

// A process cannot be given a realtime clock of its own on Linux (time namespaces
// know the monotonic clocks alone), and a preloaded library does not reach Go's
// clock. So the program of some nodes is built from sources in which one line differs:
// the engine, which signs the node's times and judges those of proposals, takes the
// wall time with the offset, in seconds, in the file "clock" of the node's directory. What Raft waits for
// is measured by the monotonic clock, which is never set.
var wrongClocks = harness.Patch{
	"cmd/conclaved/run.go": {{
		Old: "n.engine, err = engine.New(engine.Config{",
		New: "n.engine, err = engine.New(engine.Config{Now: chaosClock,",
	}},
	"cmd/conclaved/chaosclock.go": {{New: `package main

import (
	"os"
	"strconv"
	"strings"
	"time"
	"unsafe"
)

// chaosClock is time.Now with another wall time and the true monotonic reading, as it
// is after the system's clock was set. Seconds since 1885 begin at bit 30 of the first
// word of a time.Time that has a monotonic reading.
func chaosClock() time.Time {
	b, _ := os.ReadFile("clock")
	seconds, _ := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64)
	t := time.Now()
	*(*uint64)(unsafe.Pointer(&t)) += uint64(seconds) << 30
	return t
}
`}},
}

// setClock sets the offset of a node's clock, in whole seconds.
func setClock(file string, offset time.Duration) error {
	tmp := file + ".new"
	if err := os.WriteFile(tmp, []byte(strconv.FormatInt(int64(offset/time.Second), 10)), 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, file)
}
