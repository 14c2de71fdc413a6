// Command demo tells the main job of Conclave as a story on a fresh development
// cluster: three nations, real HSMs and a TPM, one rotation approved across
// borders. It uses the real programs, checks every step, and fails loudly at the
// first one that does not hold. Its last line is "demo: N checks passed".
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/conclave-kms/conclave/test/harness"
)

func main() {
	bin := flag.String("bin", os.Getenv(harness.BinEnv), "directory with conclaved and conclave (default: build them)")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *bin, flag.NArg()); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(ctx context.Context, binDir string, args int) (err error) {
	if args != 0 {
		return errors.New("demo takes no arguments; see: demo --help")
	}
	if err := harness.MissingTools(); err != nil {
		return fmt.Errorf("this machine lacks something: %w", err)
	}
	bin, remove, err := programs(ctx, binDir)
	if err != nil {
		return err
	}
	defer remove()
	work, err := os.MkdirTemp("", "conclave-demo")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(work)) }()

	begin := time.Now()
	s := &story{work: work, bin: bin, colour: terminal(os.Stdout)}
	defer func() { err = errors.Join(err, s.end()) }()
	if err := s.tell(ctx); err != nil {
		return err
	}
	if err := s.end(); err != nil {
		return err
	}
	s.say("\nAll of it took %.0f seconds.", time.Since(begin).Seconds())
	fmt.Printf("demo: %d checks passed\n", s.n)
	return nil
}

func programs(ctx context.Context, dir string) (harness.Binaries, func(), error) {
	if dir == "" {
		return harness.Find(ctx)
	}
	b, err := harness.In(dir)
	return b, func() {}, err
}

// tell runs the chapters in order.
func (s *story) tell(ctx context.Context) error {
	fmt.Println("Conclave: keys that several nations share, and that none of them can change alone.")
	for _, chapter := range []func(context.Context) error{
		s.found, s.connect, s.keys, s.share, s.residency, s.rotate, s.after, s.operations, s.evidence, s.retry, s.suspend, s.hardware, s.kill,
	} {
		if err := chapter(ctx); err != nil {
			return err
		}
	}
	return nil
}

func (s *story) file(name string) string { return filepath.Join(s.work, name) }
