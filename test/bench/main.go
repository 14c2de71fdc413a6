// Command bench measures a development cluster on this machine: what a request
// costs as a ratio to a bare TLS server in the same run, what a durable access log leaves
// of the throughput without one, key creations through
// three nodes, the devices' raw rates, and what encryption with a key of protection
// hardware gets out of a token.
//
//	make bench
//
// CPU is the server process's own, read from the kernel's process clock, so the
// load generator beside it does not count. Every figure comes from this run.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

func main() {
	bin := flag.String("bin", "bin", "directory with conclaved and conclave")
	span := flag.Duration("time", 3*time.Second, "length of one measurement")
	only := flag.Bool("hardware", false, "measure a key of protection hardware on SoftHSM and nothing else")
	bare := flag.String("bare", "", "internal: serve as the bare server with certificate FILE,FILE")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	var err error
	if *bare != "" {
		err = serveBare(*bare)
	} else if *only {
		err = hardwareOnly(ctx)
	} else {
		err = measure(ctx, *bin, *span)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func measure(ctx context.Context, bin string, span time.Duration) error {
	binaries, err := harness.In(bin)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "cvb")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := nodes(ctx, binaries, filepath.Join(dir, "dev"), span); err != nil {
		return err
	}
	if err := devices(ctx, dir, span/3); err != nil {
		return err
	}
	// In a process of its own, for SoftHSM reads its configuration once per process.
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, self, "-hardware")
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	return cmd.Run()
}

// nodes measures a development cluster.
func nodes(ctx context.Context, binaries harness.Binaries, dir string, span time.Duration) error {
	c, err := harness.Start(ctx, binaries, dir, false)
	if err != nil {
		return err
	}
	defer c.Stop()
	fmt.Printf("%-34s %8.1f s\n", "conclaved dev is ready after", c.Took.Seconds())
	for _, n := range c.All() {
		mib, err := residentMiB(n.PID())
		if err != nil {
			return err
		}
		fmt.Printf("%-34s %8.1f MiB\n", "resident memory when idle, "+n.ID, mib)
	}
	if err := requests(ctx, c, span); err != nil {
		return err
	}
	if err := accessLog(ctx, c, filepath.Dir(dir), span); err != nil {
		return err
	}
	return creations(ctx, c, span)
}

// residentMiB reads a process's resident set.
func residentMiB(pid int) (float64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmRSS:"); ok {
			kib, err := strconv.ParseFloat(strings.Fields(rest)[0], 64)
			return kib / 1024, err
		}
	}
	return 0, fmt.Errorf("process %d has no VmRSS", pid)
}

// creations measures key creations a second through all three nodes at once.
func creations(ctx context.Context, c *harness.Cluster, span time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, span)
	defer cancel()
	const workers = 8
	type result struct {
		made int
		err  error
	}
	results := make(chan result)
	begin := time.Now()
	for _, site := range []string{"fr", "de", "jp"} {
		cl, err := c.Client(site, "operator")
		if err != nil {
			return err
		}
		for w := range workers {
			go func() {
				var r result
				for ctx.Err() == nil {
					name := fmt.Sprintf("bench-%s-%d-%d", site, w, r.made)
					if _, err := cl.CreateKey(ctx, "coalition", wire.CreateKeyRequest{Name: name, Purpose: "encrypt"}); err != nil {
						if ctx.Err() == nil {
							r.err = err
						}
						break
					}
					r.made++
				}
				results <- r
			}()
		}
	}
	total := 0
	for range 3 * workers {
		r := <-results
		if r.err != nil {
			return fmt.Errorf("create a key: %w", r.err)
		}
		total += r.made
	}
	fmt.Printf("\n%-34s %8.0f /s (%d callers at three nodes)\n", "key creations", float64(total)/time.Since(begin).Seconds(), 3*workers)
	return nil
}
