package harness

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// Result is what a command printed and how it ended.
type Result struct {
	Args   []string
	Stdout string
	Stderr string
	Code   int // exit code
}

// Err returns nil when the command succeeded, else its message.
func (r Result) Err() error {
	if r.Code == 0 {
		return nil
	}
	return fmt.Errorf("conclave %s: exit code %d: %s", strings.Join(r.Args, " "), r.Code, strings.TrimSpace(r.Stderr))
}

// Text returns standard output without the final line break.
func (r Result) Text() string { return strings.TrimRight(r.Stdout, "\n") }

// JSON decodes standard output into out.
func (r Result) JSON(out any) error {
	if err := r.Err(); err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(r.Stdout), out); err != nil {
		return fmt.Errorf("conclave %s: %w in %q", strings.Join(r.Args, " "), err, r.Stdout)
	}
	return nil
}

// Env is the environment of a command. An empty one is empty: nothing of this
// process's own is added.
type Env map[string]string

// With returns a copy with more or other variables, given as NAME, VALUE pairs.
func (e Env) With(pairs ...string) Env {
	out := maps.Clone(e)
	if out == nil {
		out = Env{}
	}
	for i := 0; i+1 < len(pairs); i += 2 {
		out[pairs[i]] = pairs[i+1]
	}
	return out
}

func (e Env) list() []string {
	out := make([]string, 0, len(e))
	for _, k := range slices.Sorted(maps.Keys(e)) {
		out = append(out, k+"="+e[k])
	}
	return out
}

// Run runs a program to its end with exactly the environment env and stdin (nil
// for none). An exit code other than 0 is no error here; a program that cannot
// be started or is cut off by ctx is.
func Run(ctx context.Context, program string, env Env, stdin io.Reader, args ...string) (Result, error) {
	return Watched(ctx, program, env, stdin, io.Discard, args...)
}

// Watched is Run that writes what the program says on its standard error to said, too,
// as it comes.
func Watched(ctx context.Context, program string, env Env, stdin io.Reader, said io.Writer, args ...string) (Result, error) {
	r := Result{Args: args}
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Env = env.list()
	if len(cmd.Env) == 0 {
		cmd.Env = []string{} // nil would mean this process's own
	}
	cmd.Stdin = stdin
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, io.MultiWriter(&stderr, said)
	err := cmd.Run()
	r.Stdout, r.Stderr = stdout.String(), stderr.String()
	var exit *exec.ExitError
	switch {
	case ctx.Err() != nil:
		return r, fmt.Errorf("%s %s: %w: %s", program, strings.Join(args, " "), ctx.Err(), r.Stderr)
	case errors.As(err, &exit):
		r.Code = exit.ExitCode()
	case err != nil:
		return r, err
	}
	return r, nil
}

// base is what programs that look for other programs need of our environment.
func base() Env {
	e := Env{}
	for _, name := range []string{"PATH", "HOME", "TMPDIR", "SOFTHSM2_MODULE"} {
		if v, ok := os.LookupEnv(name); ok {
			e[name] = v
		}
	}
	return e
}
