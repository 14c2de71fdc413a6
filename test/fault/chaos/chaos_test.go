//go:build fault

package chaos

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/test/harness"
)

// Variables that `make fault` sets.
const (
	minutesEnv = "CONCLAVE_FAULT_MINUTES" // of TestChaos; default 2
	seedEnv    = "CONCLAVE_FAULT_SEED"    // of the faults and the load; default: the time
)

// need skips the test, or fails it when CI=true, where this machine lacks a tool.
func need(t *testing.T) {
	t.Helper()
	err := harness.MissingTools()
	if _, lookErr := exec.LookPath("strace"); lookErr != nil {
		err = errors.Join(err, lookErr)
	}
	if testing.Short() {
		err = errors.Join(err, errors.New("fault tests are not short"))
	}
	switch {
	case err == nil:
	case os.Getenv("CI") == "true":
		t.Fatal(err)
	default:
		t.Skip(err)
	}
}

// number reads a number from the environment.
func number(t *testing.T, name string, missing uint64) uint64 {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return missing
	}
	n, err := strconv.ParseUint(text, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// binaries builds both programs, or takes those of CONCLAVE_BIN.
func binaries(t *testing.T) harness.Binaries {
	t.Helper()
	need(t)
	bin, remove, err := harness.Find(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(remove)
	return bin
}

// TestChaos is the engine: faults under load, then the checks.
func TestChaos(t *testing.T) {
	bin := binaries(t)
	seed := number(t, seedEnv, uint64(time.Now().UnixNano()))
	length := time.Duration(number(t, minutesEnv, 2)) * time.Minute
	t.Logf("seed %d (%s), %v", seed, seedEnv, length)
	r := found(t, bin, seed)
	load, err := NewLoad(t.Context(), r.c, seed)
	if err != nil {
		t.Fatal(err, r.c.Logs(10))
	}
	defer load.Close()
	faults := r.newFaults(load.history.Now, seed)

	// What comes before the faults and after them takes part of the time.
	ctx, cancel := context.WithTimeout(t.Context(), length-30*time.Second)
	defer cancel()
	injecting := make(chan struct{})
	go func() {
		defer close(injecting)
		faults.Run(ctx, 2*time.Second)
	}()
	load.Run(ctx, 6)
	<-injecting
	r.judge(t, load, faults)
}

// coalition is what TestChaos breaks.
type coalition struct {
	c      *harness.Coalition
	disks  map[string]*disk
	clocks map[string]string
}

// found makes five nodes at three sites. jp is 150 ms away from the others, fr and de
// are 20 ms apart. Where this process is root, two nodes have a small disk of their own.
func found(t *testing.T, bin harness.Binaries, seed uint64) coalition {
	t.Helper()
	dir := t.TempDir()
	r := coalition{disks: map[string]*disk{}, clocks: map[string]string{}}
	patched, err := wrongClocks.Build(t.Context(), filepath.Join(dir, "patched"))
	if err != nil {
		t.Fatal(err)
	}
	plan := harness.Plan{
		Nodes: map[string]int{"fr": 2, "de": 2, "jp": 1}, Seed: seed,
		Cluster: map[string]any{"heartbeat": "3s", "snapshot_threshold": 512},
		Program: map[string]string{"de-2": patched, "jp-1": patched},
		DataDir: func(node, dir string) (string, error) {
			data := filepath.Join(dir, "data")
			if node != "fr-2" && node != "jp-1" || os.Geteuid() != 0 {
				return data, nil
			}
			d, err := newDisk(filepath.Join(dir, "disk"))
			if err != nil {
				return "", err
			}
			t.Cleanup(func() {
				if err := d.unmount(); err != nil {
					t.Error(err)
				}
			})
			r.disks[node] = d
			return filepath.Join(d.dir, "data"), nil
		},
	}
	r.c, err = harness.Found(t.Context(), bin, filepath.Join(dir, "c"), plan)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.c.Stop(); err != nil {
			t.Error(err)
		}
	})
	for node := range plan.Program {
		r.clocks[node] = filepath.Join(r.c.Node(node).Dir, "clock")
	}
	for _, a := range r.c.Nodes {
		for _, b := range r.c.Nodes {
			switch {
			case a.Site == b.Site:
			case a.Site == "jp" || b.Site == "jp":
				r.c.Links.Delay(150*ms, harness.Link{From: a.ID, To: b.ID})
			default:
				r.c.Links.Delay(20*ms, harness.Link{From: a.ID, To: b.ID})
			}
		}
	}
	if err := r.c.Start(t.Context()); err != nil {
		t.Fatal(err, r.c.Logs(10))
	}
	return r
}

// newFaults returns what this machine can do to the coalition.
func (r coalition) newFaults(now func() time.Duration, seed uint64) *Faults {
	f := NewFaults(r.c, now, seed)
	f.withStrace()
	f.withDisks(r.disks)
	f.withClocks(r.clocks)
	return f
}

// judge checks what the load has recorded and what the nodes hold.
func (r coalition) judge(t *testing.T, load *Load, faults *Faults) {
	t.Helper()
	ctx := context.Background()
	if err := faults.Heal(ctx); err != nil {
		t.Fatal(err, r.c.Logs(20))
	}
	if err := load.ReadAll(ctx); err != nil {
		t.Error(err)
	}
	opened, err := load.data.openAll(ctx)
	if err != nil {
		t.Error(err)
	}
	size, err := r.c.SameLog(ctx)
	if err != nil {
		t.Error(err, r.c.Logs(10))
	}
	if err := r.c.Stop(); err != nil {
		t.Error(err)
	}
	same, hash, err := sameReplicas(r.c, int(size))
	if err != nil {
		t.Error(err)
	}
	ops := load.history.All()
	begin := time.Now()
	v := Check(ops, 20*time.Second, os.Getenv("CONCLAVE_FAULT_DIR"))
	checked := time.Since(begin)
	for _, x := range v.Violations {
		t.Error(x)
	}
	if len(v.Undecided) > 0 {
		t.Errorf("the checker did not finish with the keys %v", v.Undecided)
	}
	for _, list := range [][]string{load.data.tooOld(ops), load.errors.unexplained(), load.data.errors.unexplained(), faults.failures} {
		for _, x := range list {
			t.Error(x)
		}
	}
	f := Figures{outcomes: map[Outcome]int{}, failed: load.failed, failover: failovers(ops, faults.done)}
	f.faults, f.total = faults.counts()
	for _, o := range ops {
		f.outcomes[o.Outcome]++
	}
	t.Logf("%v", f)
	t.Logf("tries by answer: %v", &load.errors)
	t.Logf("data operations: %v; opened again %d, at the end everywhere %d", &load.data.errors, load.data.decrypt, opened)
	t.Logf("checked %d operations on %d keys in %v: %d violations", v.Ops, v.Keys, checked.Round(ms), len(v.Violations))
	t.Logf("five replicas hold the same %d entries, verified (log size %d, state %x); %d times a node was started anew as it asked for", same, size, hash[:8], faults.restarted)
	for reason, n := range faults.endings() {
		t.Logf("ended by itself, %d times: %s", n, strings.TrimSpace(reason))
	}
	if t.Failed() {
		for _, s := range faults.done {
			t.Logf("%v to %v: %s of %v, leader %v", s.from.Round(ms), s.to.Round(ms), s.kind, s.nodes, s.leader)
		}
		t.Log(r.c.Logs(100))
	}
	if f.total == 0 || f.outcomes[OK] == 0 || v.Keys == 0 {
		t.Error("nothing was tried")
	}
}
