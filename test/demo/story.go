package main

import (
	"context"
	"fmt"
	"os"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// stepLimit bounds one check.
const stepLimit = 90 * time.Second

// story is the demo while it runs.
type story struct {
	work   string
	bin    harness.Binaries
	colour bool
	n      int // checks passed
	c      *harness.Cluster

	// What one chapter leaves for the next.
	wrapped  []byte // data key of the report, wrapped
	dataKeys [][]byte
	report   []byte // what was encrypted with it
	order    string // ciphertext under coalition/orders version 1, base64
	plan     string // ciphertext under europe/plans, base64
	rotation wire.Proposal
}

var orderContext = []string{"--context", "mission=falcon", "--context", "unit=7"}

const orderText = "convoy leaves at 0400"

// check runs one step and reports it. The first that fails ends the story.
func (s *story) check(parent context.Context, what string, step func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(parent, stepLimit)
	defer cancel()
	begin := time.Now()
	err := step(ctx)
	took := time.Since(begin)
	if parent.Err() != nil {
		return fmt.Errorf("demo: interrupted at step %d, %q", s.n+1, what)
	}
	if err != nil {
		fmt.Printf("%s %d  %s\n", s.paint("31;1", "FAILED"), s.n+1, what)
		logs := ""
		if s.c != nil {
			logs = "\n" + s.c.Logs(8)
		}
		return fmt.Errorf("demo: step %d, %q: %w%s", s.n+1, what, err, logs)
	}
	s.n++
	fmt.Printf("%s %2d  %s %s\n", s.paint("32", "ok"), s.n, what, s.paint("2", "("+short(took)+")"))
	return nil
}

// step is a check that is not carried out yet.
type step struct {
	what string
	do   func(context.Context) error
}

func (s *story) checks(ctx context.Context, steps ...step) error {
	for _, st := range steps {
		if err := s.check(ctx, st.what, st.do); err != nil {
			return err
		}
	}
	return nil
}

func short(d time.Duration) string {
	switch {
	case d < time.Millisecond:
		return "<1 ms"
	case d < 10*time.Second:
		return fmt.Sprintf("%d ms", d.Milliseconds())
	}
	return fmt.Sprintf("%.1f s", d.Seconds())
}

// chapter prints a heading and what it is about.
func (s *story) chapter(title string, lines ...string) {
	fmt.Printf("\n%s\n", s.paint("1", title))
	for _, l := range lines {
		fmt.Println(l)
	}
}

func (s *story) say(format string, args ...any) { fmt.Printf(format+"\n", args...) }

func (s *story) paint(code, text string) string {
	if !s.colour {
		return text
	}
	return "\x1b[" + code + "m" + text + "\x1b[0m"
}

// terminal reports whether f is one that takes colour (https://no-color.org).
func terminal(f *os.File) bool {
	info, err := f.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0 && os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb"
}

// end stops the cluster, once.
func (s *story) end() error {
	if s.c == nil {
		return nil
	}
	c := s.c
	s.c = nil
	return c.Stop()
}

// conclave runs the command at a site's node, as that site's people, and wants
// it to succeed.
func (s *story) conclave(ctx context.Context, site string, args ...string) (string, error) {
	r, err := s.c.CLI(ctx, s.c.Env(site), args...)
	if err != nil {
		return "", err
	}
	return r.Text(), r.Err()
}

// read runs the command and decodes its JSON output.
func (s *story) read(ctx context.Context, site string, out any, args ...string) error {
	r, err := s.c.CLI(ctx, s.c.Env(site), append(args, "-o", "json")...)
	if err != nil {
		return err
	}
	return r.JSON(out)
}

// write is read for a command that changes something: it returns when every
// running node has applied the change, so that the next step may ask any of them.
func (s *story) write(ctx context.Context, site string, out any, args ...string) error {
	if err := s.read(ctx, site, out, args...); err != nil {
		return err
	}
	_, _, err := s.c.SameLog(ctx)
	return err
}

// refused runs the command and wants it to fail with the exit code and to say
// all the words.
func (s *story) refused(ctx context.Context, env harness.Env, code int, words []string, args ...string) error {
	r, err := s.c.CLI(ctx, env, args...)
	if err != nil {
		return err
	}
	if r.Code == 0 {
		return fmt.Errorf("conclave %s succeeded; it must be refused", strings.Join(args, " "))
	}
	if r.Code != code {
		return fmt.Errorf("exit code %d instead of %d: %w", r.Code, code, r.Err())
	}
	for _, w := range words {
		if !strings.Contains(r.Stderr, w) {
			return fmt.Errorf("the message does not say %q: %s", w, r.Stderr)
		}
	}
	return nil
}

// want compares.
func want[T comparable](what string, got, wanted T) error {
	if got != wanted {
		return fmt.Errorf("%s is %v, not %v", what, got, wanted)
	}
	return nil
}

// all returns the first of the errors: what follows it is mostly its consequence.
func all(errs ...error) error {
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

// key describes a key as a site's node sees it.
func (s *story) key(ctx context.Context, site, path string) (wire.Key, error) {
	var k wire.Key
	return k, s.read(ctx, site, &k, "key", "show", path)
}

// approve has a custodian approve a proposal with the key file at the custodian's site.
func (s *story) approve(ctx context.Context, custodian, proposal string) (wire.Proposal, error) {
	keyFile, pass := s.c.CustodianFiles(custodian)
	var p wire.Proposal
	err := s.write(ctx, custodian[:2], &p, "proposal", "approve", proposal, "--custodian-key", keyFile, "--pass-file", pass, "--yes")
	return p, err
}
