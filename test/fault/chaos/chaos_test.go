package chaos

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/test/harness"
)

// TestChaos is the engine: faults under load, then the checks.
func TestChaos(t *testing.T) {
	bin := need(t)
	seed := number(t, seedEnv, uint64(time.Now().UnixNano()))
	length := time.Duration(number(t, minutesEnv, 2)) * time.Minute
	t.Logf("seed %d (%s), %v", seed, seedEnv, length)
	r := found(t, bin, seed)
	load, err := NewLoad(t.Context(), r.c, seed)
	if err != nil {
		t.Fatal(err, r.c.Logs(10))
	}
	defer load.Close()
	faults := r.newFaults(t, load.history.Now, seed)

	// What comes before the faults and after them takes part of the time.
	ctx, cancel := context.WithTimeout(t.Context(), length-30*time.Second)
	defer cancel()
	injecting := make(chan struct{})
	go func() {
		defer close(injecting)
		faults.Run(ctx, 1500*ms)
	}()
	load.Run(ctx, 6)
	<-injecting
	r.judge(t, load, faults)
	if n := len(faults.done); length >= 10*time.Minute && n < 20*int(length/time.Minute) {
		t.Errorf("%d faults in %v are too few", n, length)
	}
}

// coalition is what TestChaos breaks.
type coalition struct {
	c      *harness.Coalition
	disks  map[string]*disk
	clocks map[string]string
	lacks  []string // faults that this machine does not allow, and why
}

// found makes five nodes at three sites. jp is 150 ms away from the others, fr and de
// are 20 ms apart. Where this process may mount, two nodes have a small disk of their own.
func found(t *testing.T, bin programs, seed uint64) coalition {
	t.Helper()
	dir := t.TempDir()
	r := coalition{disks: map[string]*disk{}, clocks: map[string]string{}}
	plan := harness.Plan{
		Nodes: map[string]int{"fr": 2, "de": 2, "jp": 1}, Seed: seed,
		Cluster: map[string]any{"heartbeat": "3s", "snapshot_threshold": 512},
		Program: map[string]string{"de-2": bin.changed, "jp-1": bin.changed},
		DataDir: func(node, dir string) (string, error) {
			data := filepath.Join(dir, "data")
			if node != "fr-2" && node != "jp-1" {
				return data, nil
			}
			d, err := newDisk(filepath.Join(dir, "disk"))
			if err != nil {
				r.lacks = append(r.lacks, fmt.Sprintf("%s of %s: %v", fullDisk, node, err))
				return data, nil
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
	var err error
	r.c, err = harness.Found(t.Context(), bin.Binaries, filepath.Join(dir, "c"), plan)
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
func (r coalition) newFaults(t *testing.T, now func() time.Duration, seed uint64) *Faults {
	f := NewFaults(r.c, now, seed)
	if err := f.withStrace(); err != nil {
		r.lacks = append(r.lacks, fmt.Sprintf("%s: %v", badSync, err))
	}
	f.withDisks(r.disks)
	f.withClocks(r.clocks)
	for _, x := range r.lacks {
		t.Logf("not tried, this machine does not allow it: %s", x)
	}
	return f
}

// judge checks what the load has recorded and what the nodes hold.
func (r coalition) judge(t *testing.T, load *Load, faults *Faults) {
	t.Helper()
	r.compare(t, load, faults)
	ops := load.history.All()
	begin := time.Now()
	v := Check(ops, time.Minute, os.Getenv("CONCLAVE_FAULT_DIR"))
	checked := time.Since(begin)
	if len(v.Undecided) > 0 {
		t.Errorf("the checker did not finish with the keys %v", v.Undecided)
	}
	gone, acknowledged := lost(ops)
	tooOld := load.data.tooOld(ops)
	for _, list := range [][]string{v.Violations, gone, tooOld, load.errors.unexplained(), load.data.errors.unexplained(), faults.failures} {
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
	t.Logf("data operations: %v; opened again %d", &load.data.errors, load.data.decrypt)
	t.Logf("%d operations on %d keys, checked in %v: %d linearizability violations; %d acknowledged writes: %d lost; %d encryptions from a state older than allowed",
		v.Ops, v.Keys, checked.Round(ms), len(v.Violations), acknowledged, len(gone), len(tooOld))
	for reason, n := range faults.endings() {
		t.Logf("ended by itself, %d times: %s", n, strings.TrimSpace(reason))
	}
	if t.Failed() || testing.Verbose() {
		for _, s := range faults.done {
			t.Logf("%v to %v: %s of %v, leader %v", s.from.Round(ms), s.to.Round(ms), s.kind, s.nodes, s.leader)
		}
	}
	if t.Failed() {
		t.Log(r.c.Logs(100))
	}
	if f.total == 0 || f.outcomes[OK] == 0 || v.Keys == 0 {
		t.Error("nothing was tried")
	}
}

// trusted wants no node to have suspected another but one whose clock was set.
func (r coalition) trusted(t *testing.T) {
	t.Helper()
	unfounded, founded, err := suspicions(r.c, r.clocks)
	if err != nil {
		t.Error(err)
	}
	for _, x := range unfounded {
		t.Error(x)
	}
	t.Logf("suspicions: %d of clocks that were set, %d others", founded, len(unfounded))
}

// compare heals everything, reads all that is there, stops the nodes, and holds what they have in memory and on
// disk against one another and against what callers were told.
func (r coalition) compare(t *testing.T, load *Load, faults *Faults) {
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
	hash, err := sameState(ctx, r.c)
	if err != nil {
		t.Error(err)
	}
	if err := r.c.Stop(); err != nil {
		t.Error(err)
	}
	same, err := sameReplicas(r.c, int(size), hash)
	if err != nil {
		t.Error(err)
	}
	entries, err := accessLogs(r.c, load.data.served)
	if err != nil {
		t.Error(err)
	}
	r.trusted(t)
	if !t.Failed() {
		t.Logf("five replicas hold the same %d entries, each verified, and the same state at entry %d (%x); their access logs verify, with %d entries; %d ciphertexts open everywhere; %d times a node was started anew as it asked for",
			same, hash.index, hash.hash[:8], entries, opened, faults.restarted)
	}
}
