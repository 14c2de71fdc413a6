package chaos

import (
	"os"
	"strconv"
	"time"

	"github.com/conclave-kms/conclave/test/harness"
)

// plantedFile in a node's directory turns the planted bugs on.
const plantedFile = "planted"

// changed is the product with changes that no operating system offers: a clock of its own,
// and, in a node with a file "planted" in its directory, two bugs that the checker must find:
// readings are answered from whatever the node has, and writes are acknowledged
// although their outcome is unknown.
//
// A process cannot be given a realtime clock of its own on Linux (time namespaces
// know the monotonic clocks alone), and a preloaded library does not reach Go's
// clock. So the program of some nodes is built from sources in which one line differs:
// the engine, which signs the node's times and judges those of proposals, takes the
// wall time with the offset, in seconds, in the file "clock" of the node's directory. What Raft waits for
// is measured by the monotonic clock, which is never set.
var changed = harness.Patch{
	"kms/engine/consistency.go": {
		{Old: "	\"context\"\n", New: "	\"context\"\n	\"os\"\n"},
		{
			Old: "	err := e.cluster.Barrier(bounded)\n",
			New: "	if chaosPlanted() {\n		return nil\n	}\n	err := e.cluster.Barrier(bounded)\n",
		},
		{
			Old: "// atHand lists",
			New: "func chaosPlanted() bool {\n	_, err := os.Stat(\"" + plantedFile + "\")\n	return err == nil\n}\n\n// atHand lists",
		},
	},
	"kms/engine/write.go": {{
		Old: "	res, err := c.Propose(ctx, state.Join(b, sig))\n",
		New: "	res, err := c.Propose(ctx, state.Join(b, sig))\n	if kms.KindOf(err) == kms.Unknown && chaosPlanted() {\n		return res, nil\n	}\n",
	}},
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
