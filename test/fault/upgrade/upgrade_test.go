//go:build fault

// Package upgrade tests that a cluster takes a new release node by node, under load.
package upgrade

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/kms/wire"
	"github.com/conclave-kms/conclave/test/harness"
)

// previous is the commit that stands for the release before this one until there is a tag.
const previous = "f12fd1e58952ea8bfc36b21ad3275bb0d600b502"

// newKind is a kind of command that the new release knows and the previous one does not.
const newKind = "9999"

// TestRollingUpgrade starts three nodes of the previous release, replaces their programs
// one by one by that of this release, and uses the cluster all the while. Whatever the
// new release brings is taken when the last node has it, and not before.
func TestRollingUpgrade(t *testing.T) {
	need(t)
	dir, err := os.MkdirTemp("", "conclave-upgrade") // short: it will hold Unix sockets
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	bin, old, next := programs(t, dir)
	c, err := harness.Found(t.Context(), bin, filepath.Join(dir, "c"), harness.Plan{
		Nodes: map[string]int{"fr": 1, "de": 1, "jp": 1}, Direct: true,
		Program: map[string]string{"fr-1": old, "de-1": old, "jp-1": old},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(c.Logs(15))
		}
		if err := c.Stop(); err != nil {
			t.Error(err)
		}
	})
	do(t, c.Start(t.Context()))
	u := &use{t: t, c: c}
	u.begin()
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() { u.write(ctx) })
	wg.Go(func() { u.read(ctx) })
	defer wg.Wait()
	defer cancel()

	for i, n := range c.Nodes {
		u.works("before " + n.ID + " is upgraded")
		do(t, n.Kill(t.Context()))
		n.Use(next)
		do(t, c.Launch(n))
		do(t, n.Ready(t.Context()))
		u.works(n.ID + " has the new release")
		u.waiting(n, c.Nodes[i+1:])
	}
	cancel()
	wg.Wait()
	size, err := c.SameLog(t.Context())
	do(t, err)
	u.all()
	t.Logf("%d keys made and %d messages opened during the upgrade, %d tries failed; %d commands in the log", len(u.keys), u.opened, u.failed, size)
}

func need(t *testing.T) {
	t.Helper()
	err := harness.MissingTools()
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

func do(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// programs builds the previous release from git, this one, and this one with a new kind
// of command, so that there is one whatever was changed since.
func programs(t *testing.T, dir string) (bin harness.Binaries, old, next string) {
	t.Helper()
	bin, remove, err := harness.Find(t.Context())
	do(t, err)
	t.Cleanup(remove)
	src := filepath.Join(dir, "previous")
	do(t, extract(t.Context(), src))
	old = filepath.Join(dir, "conclaved-previous")
	cmd := exec.CommandContext(t.Context(), "go", "build", "-ldflags", "-X main.version=previous", "-o", old, "./cmd/conclaved")
	cmd.Dir = src
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the previous release: %v\n%s", err, out)
	}
	next, err = harness.Patch{"kms/state/envelope.go": {{Old: "decode[Announce],\n", New: "decode[Announce],\n\t{" + newKind + ", 1}: decode[Tick],\n"}}}.
		Build(t.Context(), filepath.Join(dir, "next"))
	do(t, err)
	return bin, old, next
}

// extract writes the sources of the previous release to a directory.
func extract(ctx context.Context, dir string) error {
	var out, said bytes.Buffer
	cmd := exec.CommandContext(ctx, "git", "archive", "--format=tar", previous)
	cmd.Dir = filepath.Join("..", "..", "..")
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("the previous release, commit %s, is not in this repository: fetch its history (git fetch --unshallow): %w\n%s", previous, err, said.Bytes())
	}
	for r := tar.NewReader(&out); ; {
		h, err := r.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		path := filepath.Join(dir, filepath.FromSlash(h.Name))
		if !filepath.IsLocal(h.Name) {
			return fmt.Errorf("%q in the archive", h.Name)
		}
		switch h.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(path, 0o700)
		case tar.TypeReg:
			var b []byte
			if b, err = io.ReadAll(r); err == nil {
				err = errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, b, 0o600))
			}
		}
		if err != nil {
			return err
		}
	}
}

// use is the load: keys are made and messages encrypted at one node and opened at another.
type use struct {
	t *testing.T
	c *harness.Coalition

	mu     sync.Mutex
	keys   []string // acknowledged
	sealed []wire.EncryptResponse
	opened int
	failed int
}

// client returns a client that goes from node to node until one answers.
func (u *use) client(role string) *client.Client {
	u.t.Helper()
	cfg, err := u.c.Config("fr", role, u.c.Nodes...)
	do(u.t, err)
	cfg.Timeout = 30 * time.Second
	cl, err := client.New(cfg)
	do(u.t, err)
	u.t.Cleanup(cl.Close)
	return cl
}

func (u *use) begin() {
	u.t.Helper()
	cl := u.client("operator")
	_, err := cl.CreateKeyring(u.t.Context(), wire.CreateKeyringRequest{Name: "ring", Residency: []string{"de", "fr", "jp"}, Policy: "keys"})
	do(u.t, err)
	_, err = cl.CreateKey(u.t.Context(), "ring", wire.CreateKeyRequest{Name: "first", Purpose: string(kms.Encrypt)})
	do(u.t, err)
	_, err = u.c.SameLog(u.t.Context())
	do(u.t, err)
}

// fault notes an error of the load: while nodes are replaced a call may find none that
// answers, or not learn its outcome, and nothing else.
func (u *use) fault(ctx context.Context, what string, err error) {
	if ctx.Err() != nil {
		return
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.failed++
	if k := kms.KindOf(err); k != kms.Unavailable && k != kms.Unknown {
		u.t.Errorf("%s: %v (%v)", what, err, k)
	}
}

// write makes keys, one after the other.
func (u *use) write(ctx context.Context) {
	cl := u.client("operator")
	for i := 0; ctx.Err() == nil; i++ {
		name := fmt.Sprintf("key-%d", i)
		_, err := cl.CreateKey(ctx, "ring", wire.CreateKeyRequest{Name: name, Purpose: string(kms.Encrypt)})
		if err != nil {
			u.fault(ctx, "making a key", err)
			continue
		}
		u.mu.Lock()
		u.keys = append(u.keys, name)
		u.mu.Unlock()
	}
}

// read encrypts and decrypts.
func (u *use) read(ctx context.Context) {
	k := u.client("service").Key("ring", "first")
	for ctx.Err() == nil {
		e, err := k.Encrypt(ctx, wire.EncryptRequest{Plaintext: wire.Secret("message")})
		if err != nil {
			u.fault(ctx, "encrypting", err)
			continue
		}
		d, err := k.Decrypt(ctx, wire.DecryptRequest{Ciphertext: e.Ciphertext})
		if err != nil {
			u.fault(ctx, "decrypting", err)
			continue
		}
		u.mu.Lock()
		if u.opened++; string(d.Plaintext) != "message" {
			u.t.Errorf("decrypted %q", d.Plaintext)
		}
		if u.opened%50 == 1 {
			u.sealed = append(u.sealed, e)
		}
		u.mu.Unlock()
	}
}

// works waits until the load has got on.
func (u *use) works(when string) {
	u.t.Helper()
	count := func() (int, int) {
		u.mu.Lock()
		defer u.mu.Unlock()
		return len(u.keys), u.opened
	}
	keys, opened := count()
	do(u.t, harness.Within(u.t.Context(), time.Minute, "the load gets on: "+when, func(context.Context) error {
		if k, o := count(); k < keys+3 || o < opened+3 {
			return fmt.Errorf("%d keys and %d messages since", k-keys, o-opened)
		}
		return nil
	}))
}

// waiting checks what the upgraded node says of the new kind of command: that it waits for
// the nodes that are not upgraded.
func (u *use) waiting(n *harness.Node, behind []*harness.Node) {
	u.t.Helper()
	do(u.t, harness.Within(u.t.Context(), time.Minute, n.ID+" says what waits for whom", func(ctx context.Context) error {
		s, err := u.c.Status(ctx, n)
		if err != nil {
			return err
		}
		line := "" // no line: it is taken
		if i := slices.IndexFunc(s.Waiting, func(l string) bool { return strings.Contains(l, "type "+newKind+" ") }); i >= 0 {
			line = s.Waiting[i]
		}
		for _, m := range u.c.Nodes {
			if strings.Contains(line, m.ID) != slices.Contains(behind, m) {
				return fmt.Errorf("it says %q; %d nodes are not upgraded", line, len(behind))
			}
		}
		return nil
	}))
}

// all checks that every node knows every key that was acknowledged, and opens the messages.
func (u *use) all() {
	u.t.Helper()
	for _, n := range u.c.Nodes {
		cl, err := u.c.Client(n, "operator", 20*time.Second)
		do(u.t, err)
		list, err := cl.Keys(u.t.Context(), "ring")
		do(u.t, err)
		for _, name := range u.keys {
			if !slices.ContainsFunc(list, func(k wire.Key) bool { return k.Name == name }) {
				u.t.Errorf("%s does not know key %s, which was acknowledged", n.ID, name)
			}
		}
		service, err := u.c.Client(n, "service", 20*time.Second)
		do(u.t, err)
		for _, e := range u.sealed {
			d, err := service.Key("ring", "first").Decrypt(u.t.Context(), wire.DecryptRequest{Ciphertext: e.Ciphertext})
			if err != nil || string(d.Plaintext) != "message" {
				u.t.Errorf("%s opens a message of the upgrade: %q, %v", n.ID, d.Plaintext, err)
			}
		}
		nodes, err := cl.Nodes(u.t.Context())
		do(u.t, err)
		for _, m := range nodes {
			if m.Release == "" || m.Release == "previous" {
				u.t.Errorf("%s says that %s runs release %q", n.ID, m.ID, m.Release)
			}
		}
	}
}
