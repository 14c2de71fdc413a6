package fault

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/kms"
	"github.com/conclave-kms/conclave/kms/client"
	"github.com/conclave-kms/conclave/test/harness"
)

const (
	// recovery is the time from the return of a device until everything works again.
	recovery = 30 * time.Second
	// callTimeout is that of the nodes' devices, so that a hanging one is noticed soon.
	callTimeout = "2s"
)

// suite is what the tests share: the programs, and one cluster that every test
// leaves with all nodes ready.
var suite struct {
	sync.Mutex
	dir     string
	bin     harness.Binaries
	remove  func()
	cluster *harness.Cluster
	tried   bool
	shim    shim
}

func TestMain(m *testing.M) {
	if run := helpers[os.Getenv(helperEnv)]; run != nil {
		os.Exit(run())
	}
	code := m.Run()
	if suite.cluster != nil {
		if err := suite.cluster.Stop(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	if suite.remove != nil {
		suite.remove()
		_ = os.RemoveAll(suite.dir)
	}
	os.Exit(code)
}

// need skips the test, or fails it when CI=true, where this machine lacks a tool.
func need(t *testing.T, tools ...string) {
	t.Helper()
	err := harness.MissingTools()
	for _, tool := range tools {
		if _, lookErr := exec.LookPath(tool); lookErr != nil {
			err = errors.Join(err, lookErr)
		}
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

// world is the shared cluster as a test sees it.
type world struct {
	t    *testing.T
	c    *harness.Cluster
	shim shim // of fr's library
}

// cluster returns the shared cluster with all nodes ready.
func cluster(t *testing.T) *world {
	t.Helper()
	need(t, "cc")
	suite.Lock()
	defer suite.Unlock()
	if suite.cluster == nil {
		if suite.tried {
			t.Fatal("the cluster did not start before")
		}
		suite.tried = true
		start(t)
	}
	w := &world{t, suite.cluster, suite.shim}
	w.do(w.c.Ready(t.Context()))
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(w.c.Logs(15))
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := w.c.Ready(ctx); err != nil {
			t.Errorf("the test leaves the cluster broken: %v", err)
		}
	})
	return w
}

// start builds the programs and starts the cluster, with the shim between fr's
// node and SoftHSM.
func start(t *testing.T) {
	t.Helper()
	bin, remove, err := harness.Find(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "conclave-fault") // short: it will hold a Unix socket
	if err != nil {
		remove()
		t.Fatal(err)
	}
	suite.bin, suite.remove, suite.dir = bin, remove, dir
	c, err := harness.Start(context.Background(), bin, filepath.Join(dir, "c"), false)
	if err != nil {
		t.Fatal(err)
	}
	suite.cluster = c
	suite.shim = buildShim(t, filepath.Join(dir, "shim"))
	fr, jp := c.Nodes["fr"], c.Nodes["jp"]
	w := &world{t: t, c: c}
	w.configure(fr, map[string]any{"device.uri": w.uri(fr, suite.shim.library), "device.call_timeout": callTimeout, "device.isolate": false})
	w.configure(jp, map[string]any{"device.call_timeout": callTimeout})
	for _, n := range []*harness.Node{fr, jp} {
		w.do(n.Restart(t.Context()))
	}
}

// configure changes a node's configuration file.
func (w *world) configure(n *harness.Node, changes map[string]any) (restore func()) {
	w.t.Helper()
	back, err := n.Configure(changes)
	w.do(err)
	return func() { w.t.Helper(); w.do(back()) }
}

// uri returns the PKCS#11 URI of a node with another library.
func (w *world) uri(n *harness.Node, library string) string {
	w.t.Helper()
	s, err := n.Setting("device.uri")
	w.do(err)
	u, err := hsm.ParseURI(s)
	w.do(err)
	u.ModulePath = library
	return u.String()
}

// do fails the test for an error.
func (w *world) do(err error) {
	w.t.Helper()
	if err != nil {
		w.t.Fatal(err)
	}
}

// eventually waits until cond holds, at most d.
func (w *world) eventually(d time.Duration, what string, cond func(ctx context.Context) error) {
	w.t.Helper()
	w.do(harness.Within(w.t.Context(), d, what, cond))
}

// client returns the shared client of a site's node for a role.
func (w *world) client(site, role string) *client.Client {
	w.t.Helper()
	cl, err := w.c.Client(site, role)
	w.do(err)
	return cl
}

// once returns a client that does not try again.
func (w *world) once(site, role string) *client.Client {
	w.t.Helper()
	cl, err := w.c.ClientOnce(site, role, 15*time.Second)
	w.do(err)
	w.t.Cleanup(cl.Close)
	return cl
}

var names atomic.Uint64

// unique returns a name that no other test and no repetition of it uses.
func unique(base string) string { return fmt.Sprintf("%s-%d", base, names.Add(1)) }

// names one of the words, which say what is wrong.
func mustName(t *testing.T, what, text string, words []string) {
	t.Helper()
	for _, word := range words {
		if strings.Contains(strings.ToLower(text), strings.ToLower(word)) {
			return
		}
	}
	t.Errorf("%s says %q, which names none of %q", what, text, words)
}

// refused wants an error of the kind.
func refused(t *testing.T, what string, err error, kind kms.Kind) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Errorf("%s: %v (%v); wanted %v", what, err, kms.KindOf(err), kind)
	}
}
