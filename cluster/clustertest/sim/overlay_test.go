package sim

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// edit changes a source file; was stands in it once.
type edit struct {
	file    string // below the module's root, or, if it begins with "runtime/", below that of Go's sources
	was, is string
}

// overlay is what go build -overlay puts in the place of source files, so that no hook for
// the simulation stands in the product.
type overlay struct {
	t        *testing.T
	module   string
	goroot   string
	dir      string
	texts    map[string]string // by path
	replaced map[string]string
}

func newOverlay(t *testing.T) *overlay {
	t.Helper()
	module, err := filepath.Abs("../../..")
	if err != nil {
		t.Fatal(err)
	}
	root, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		t.Fatal(err)
	}
	return &overlay{t: t, module: module, goroot: strings.TrimSpace(string(root)), dir: t.TempDir(), texts: map[string]string{}, replaced: map[string]string{}}
}

func (o *overlay) path(file string) string {
	if strings.HasPrefix(file, "runtime/") {
		return filepath.Join(o.goroot, "src", file)
	}
	return filepath.Join(o.module, file)
}

// put makes a text the content of a file, which need not be there.
func (o *overlay) put(file, text string) {
	o.t.Helper()
	path := o.path(file)
	o.texts[path] = text
	stead := filepath.Join(o.dir, strings.ReplaceAll(file, "/", "_"))
	if err := os.WriteFile(stead, []byte(text), 0o600); err != nil {
		o.t.Fatal(err)
	}
	o.replaced[path] = stead
}

func (o *overlay) edit(edits ...edit) {
	o.t.Helper()
	for _, e := range edits {
		text, ok := o.texts[o.path(e.file)]
		if !ok {
			b, err := os.ReadFile(o.path(e.file))
			if err != nil {
				o.t.Fatal(err)
			}
			text = string(b)
		}
		if strings.Count(text, e.was) != 1 {
			o.t.Fatalf("%s no longer has %q once: make the edit anew", e.file, e.was)
		}
		o.put(e.file, strings.Replace(text, e.was, e.is, 1))
	}
}

// build builds this package's tests over the edited sources.
func (o *overlay) build() string {
	o.t.Helper()
	b, err := json.Marshal(map[string]any{"Replace": o.replaced})
	if err != nil {
		o.t.Fatal(err)
	}
	list, binary := filepath.Join(o.dir, "overlay.json"), filepath.Join(o.dir, "sim.test")
	if err := os.WriteFile(list, b, 0o600); err != nil {
		o.t.Fatal(err)
	}
	began := time.Now()
	if out, err := exec.Command("go", "test", "-c", "-overlay", list, "-o", binary, ".").CombinedOutput(); err != nil {
		o.t.Fatalf("%v: %s", err, out)
	}
	o.t.Logf("built in %v", time.Since(began).Round(time.Second/10))
	return binary
}

// exact makes schedules replay to the last entry, and faster.
func (o *overlay) exact() {
	o.t.Helper()
	o.edit(repeatable...)
	o.put("runtime/simulation.go", seededRuntime)
	o.put("cluster/clustertest/sim/seed.go", seedingRuntime)
	o.edit(memoised...)
	o.put("pqc/memo.go", memo)
}

// repeatable has the Go runtime decide by a seeded generator, within a bubble of
// testing/synctest, what it otherwise decides by chance or by how long something takes on
// this machine: which ready case a select takes, in which order a map is walked, which of two timers comes first that
// are due at the same instant, and when a goroutine has to let others go on.
var repeatable = []edit{
	{"runtime/select.go", "j := cheaprandn(uint32(norder + 1))", "j := simulatedRandn(uint32(norder + 1))"},
	{"runtime/time.go", "t.rand = cheaprand()", "t.rand = simulatedRand()"},
	{"runtime/rand.go", "func maps_rand() uint64 {\n", "func maps_rand() uint64 {\n\tif simulating && getg().bubble != nil {\n\t\treturn uint64(simulatedRand())<<32 | uint64(simulatedRand())\n\t}\n"},
	{"runtime/rand.go", "globalRand.state.Init(*seed)", "globalRand.state.Init([32]byte{1})"}, // of hashes
	{"runtime/proc.go", "} else if pd.schedwhen+forcePreemptNS <= now {", "} else if !simulating && pd.schedwhen+forcePreemptNS <= now {"},
	{"runtime/proc.go", "		thread, ok := setBlockOnExitSyscall(pp)\n		if !ok {\n			// Not in a syscall,",
		"		var thread syscallingThread\n		ok := false\n		if !simulating {\n			thread, ok = setBlockOnExitSyscall(pp)\n		}\n		if !ok {\n			// Not in a syscall,"},
}

const seededRuntime = `package runtime

import _ "unsafe"

var (
	simulating bool
	simulated  uint64
)

//go:linkname seedSimulation
func seedSimulation(seed uint64, on bool) { simulated, simulating = seed, on }

// simulatedRand is splitmix64.
func simulatedRand() uint32 {
	if !simulating || getg().bubble == nil {
		return cheaprand()
	}
	simulated += 0x9e3779b97f4a7c15
	z := simulated
	z = (z ^ z>>30) * 0xbf58476d1ce4e5b9
	z = (z ^ z>>27) * 0x94d049bb133111eb
	return uint32((z ^ z>>31) >> 32)
}

func simulatedRandn(n uint32) uint32 { return uint32((uint64(simulatedRand()) * uint64(n)) >> 32) }
`

const seedingRuntime = `package sim

import _ "unsafe"

//go:linkname seedSimulation runtime.seedSimulation
func seedSimulation(seed uint64, on bool)

func seedRuntime(seed uint64, on bool) { seedSimulation(seed, on) }
`

// memoised has the outcome of each verification of a signature kept: all nodes of a
// schedule are in one process, and each verifies what the others have.
var memoised = []edit{
	{"pqc/sign.go", "func Verify(suite SuiteID, pub, message, context, sig []byte) error {\n",
		"func Verify(suite SuiteID, pub, message, context, sig []byte) error {\n\treturn remembered(suite, pub, message, context, sig)\n}\n\n" +
			"func verify(suite SuiteID, pub, message, context, sig []byte) error {\n"},
}

const memo = `package pqc

import (
	"crypto/sha256"
	"encoding/binary"
	"sync"
)

var memo struct {
	sync.Mutex
	outcomes map[[32]byte]error
}

func remembered(suite SuiteID, pub, message, context, sig []byte) error {
	h := sha256.New()
	for _, b := range [][]byte{binary.BigEndian.AppendUint64(nil, uint64(suite)), pub, message, context, sig} {
		h.Write(binary.BigEndian.AppendUint64(nil, uint64(len(b))))
		h.Write(b)
	}
	key := [32]byte(h.Sum(nil))
	memo.Lock()
	err, ok := memo.outcomes[key]
	memo.Unlock()
	if ok {
		return err
	}
	err = verify(suite, pub, message, context, sig)
	memo.Lock()
	defer memo.Unlock()
	if len(memo.outcomes) >= 1<<14 || memo.outcomes == nil {
		memo.outcomes = map[[32]byte]error{}
	}
	memo.outcomes[key] = err
	return err
}
`
