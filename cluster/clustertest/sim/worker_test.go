package sim

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"runtime/debug"
	"sync"
	"syscall"
	"testing"
	"time"
)

// job is a number of schedules, played by child processes with one processor each: a
// schedule that shares Raft's random numbers or a second processor with another does
// not replay.
type job struct {
	Seed      uint64 // of the first schedule
	Schedules uint64
	Limit     time.Duration // 0: none; no schedule begins after it
	Lying     bool
	First     bool   // end with the first failure
	Aloud     bool   // tell of every fault
	Binary    string // "": this one
	Planted   string // a bug to switch on in Binary

	Worker, Workers uint64
}

// summary is what became of a job.
type summary struct {
	played    int
	failed    []Report
	counts    map[string]int
	traces    map[uint64]uint64
	simulated time.Duration
}

func (s *summary) text(real time.Duration) string {
	rate := float64(s.played) / real.Seconds()
	return fmt.Sprintf("%d schedules in %v (%.1f a second), %v simulated, %d violated: %s",
		s.played, real.Round(time.Second/10), rate, s.simulated.Round(time.Second), len(s.failed), counts(s.counts))
}

const (
	envJob = "SIM_JOB" // in a worker: its job
	// hang is how long a worker may be silent.
	hang = 2 * time.Minute
	// collect is after how many schedules a worker collects its garbage, some 15 MB each.
	collect = 4
)

// line is what a worker says: that it begins a schedule, and what became of it.
type line struct {
	Begins uint64
	Report *Report
}

// run plays the job.
func (j job) run(t *testing.T) *summary {
	t.Helper()
	if j.Binary == "" {
		exe, err := os.Executable()
		if err != nil {
			t.Fatal(err)
		}
		j.Binary = exe
	}
	sum := &summary{counts: map[string]int{}, traces: map[uint64]uint64{}}
	var mu sync.Mutex
	stop := make(chan struct{})
	var once sync.Once
	take := func(r Report) {
		mu.Lock()
		defer mu.Unlock()
		sum.played++
		sum.simulated += r.Elapsed
		sum.traces[r.Seed] = r.Trace
		for k, n := range r.Counts {
			sum.counts[k] += n
		}
		if len(r.Failures) > 0 {
			if sum.failed = append(sum.failed, r); j.First {
				once.Do(func() { close(stop) })
			}
		}
	}
	var wg sync.WaitGroup
	j.Workers = uint64(runtime.NumCPU())
	for i := range j.Workers {
		w := j
		w.Worker = i
		wg.Go(func() {
			if r := w.child(stop, take); r != nil {
				take(*r)
			}
		})
	}
	wg.Wait()
	return sum
}

// child runs one worker. It returns a report if the worker ends in the middle of a schedule.
func (j job) child(stop <-chan struct{}, take func(Report)) *Report {
	b, err := json.Marshal(j)
	if err != nil {
		panic(err) // strings and numbers
	}
	r, w, err := os.Pipe()
	if err != nil {
		return &Report{Failures: []string{err.Error()}}
	}
	defer r.Close()
	var out bytes.Buffer
	cmd := exec.Command(j.Binary, "-test.run=^TestWorker$", "-test.timeout=0", fmt.Sprintf("-test.v=%t", j.Aloud))
	cmd.Env = append(os.Environ(), envJob+"="+string(b), "CONCLAVE_PLANTED="+j.Planted, "GOMAXPROCS=1", "GOTRACEBACK=all")
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = &out, &out, []*os.File{w}
	if j.Aloud {
		cmd.Stdout = os.Stdout
	}
	err = cmd.Start()
	_ = w.Close()
	if err != nil {
		return &Report{Failures: []string{err.Error()}}
	}
	var seed uint64
	lines := make(chan line)
	go func() {
		defer close(lines)
		s := bufio.NewScanner(r)
		for s.Buffer(nil, 1<<20); s.Scan(); {
			var l line
			if json.Unmarshal(s.Bytes(), &l) == nil {
				lines <- l
			}
		}
	}()
	stopped, hung := false, false
	watchdog := time.NewTimer(hang)
	for open := true; open; {
		var l line
		select {
		case l, open = <-lines:
			watchdog.Reset(hang)
		case <-stop:
			stopped, stop = true, nil
			_ = cmd.Process.Kill()
			continue
		case <-watchdog.C:
			hung = true
			_ = cmd.Process.Signal(syscall.SIGQUIT) // it dumps its goroutines
			continue
		}
		switch {
		case !open:
		case l.Report != nil:
			take(*l.Report)
			seed = 0
		default:
			seed = l.Begins
		}
	}
	err = cmd.Wait()
	if stopped || err == nil && !hung {
		return nil
	}
	text := out.Bytes()
	return &Report{Seed: seed, Failures: []string{fmt.Sprintf("the simulation ended in the middle (hung: %v): %v\n%s", hung, err, text[:min(len(text), 20_000)])}}
}

// TestWorker plays the schedules of a worker's part. It has nothing to do in other processes.
func TestWorker(t *testing.T) {
	text, ok := os.LookupEnv(envJob)
	if !ok {
		return
	}
	var j job
	if err := json.Unmarshal([]byte(text), &j); err != nil {
		t.Fatal(err)
	}
	out := json.NewEncoder(os.NewFile(3, "report"))
	say := func(l line) {
		if err := out.Encode(l); err != nil {
			t.Fatal(err) // the parent is gone
		}
	}
	w := found(t)
	o := Options{LyingDisks: j.Lying}
	if j.Aloud {
		o.Log = t.Logf
	}
	debug.SetGCPercent(-1) // a collection takes turns with the schedule's goroutines
	began := time.Now()
	for i := j.Worker; i < j.Schedules; i += j.Workers {
		if j.Limit > 0 && time.Since(began) > j.Limit {
			return
		}
		say(line{Begins: j.Seed + i})
		r := play(t, w, j.Seed+i, o)
		if i/j.Workers%collect == 0 {
			runtime.GC()
		}
		say(line{Report: &r})
	}
}
