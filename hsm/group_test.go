package hsm_test

import (
	"context"
	"crypto/ecdsa"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/hsm/hsmtest"
	"github.com/conclave-kms/conclave/kms/secret"
)

// clones are two tokens with the same keys, as a vendor's tools make them: the second
// is a copy of the token directory behind a copy of the library.
type clones struct {
	cfgs [2]hsm.Config
	dirs [2]string // the token directories
}

func newClones(t *testing.T) clones {
	t.Helper()
	tok := hsmtest.New(t)
	cfg := tok.Config()
	tok.Provision(t, cfg)
	dir := t.TempDir()
	c := clones{cfgs: [2]hsm.Config{cfg, cfg}, dirs: [2]string{tok.Tokens, filepath.Join(dir, "tokens")}}
	if err := os.CopyFS(c.dirs[1], os.DirFS(tok.Tokens)); err != nil {
		t.Fatal(err)
	}
	lib, err := hsm.CopyLibrary(dir)
	if err != nil {
		t.Fatal(err)
	}
	u, err := hsm.ParseURI(cfg.URI)
	if err != nil {
		t.Fatal(err)
	}
	u.ModulePath = lib
	conf := filepath.Join(dir, "softhsm2.conf")
	if err := os.WriteFile(conf, []byte("directories.tokendir = "+c.dirs[1]+"\nobjectstore.backend = file\nlog.level = ERROR\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c.cfgs[1].URI, c.cfgs[1].SoftHSMConf = u.String(), conf
	return c
}

// takeAway moves the token directory of a member away; bring moves it back.
func (c clones) takeAway(t *testing.T, i int) {
	t.Helper()
	if err := os.Rename(c.dirs[i], c.dirs[i]+".away"); err != nil {
		t.Fatal(err)
	}
}

func (c clones) bring(t *testing.T, i int) {
	t.Helper()
	if err := os.Rename(c.dirs[i]+".away", c.dirs[i]); err != nil {
		t.Fatal(err)
	}
}

func openGroup(t *testing.T, cfgs ...hsm.Config) *hsm.Group {
	t.Helper()
	g, err := hsm.OpenGroup(context.Background(), cfgs)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	})
	return g
}

// allUp waits until no member is down.
func allUp(t *testing.T, g *hsm.Group) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for len(g.Down()) > 0 {
		if time.Now().After(deadline) {
			t.Fatalf("down: %v", g.Down())
		}
		time.Sleep(10 * time.Millisecond) // polls a token that comes back, no synchronisation
	}
}

func signsWith(g *hsm.Group) error {
	digest := make([]byte, 48)
	sig, err := g.Sign(context.Background(), digest)
	if err != nil {
		return err
	}
	if !ecdsa.Verify(g.SigningKey(), digest, new(big.Int).SetBytes(sig[:48]), new(big.Int).SetBytes(sig[48:])) {
		return errors.New("the signature does not verify")
	}
	return nil
}

// TestGroupFailover takes one member after the other away, under calls of all kinds.
func TestGroupFailover(t *testing.T) {
	c := newClones(t)
	g := openGroup(t, c.cfgs[0], c.cfgs[1])
	ctx := context.Background()
	key, err := secret.New(hsm.HMACKey)
	if err != nil {
		t.Fatal(err)
	}
	defer key.Destroy()
	_, public := g.ImportKey()
	blob, err := hsm.WrapHMAC(public, key, nil)
	if err != nil {
		t.Fatal(err)
	}
	mac, unload, err := g.LoadHMAC(ctx, blob)
	if err != nil {
		t.Fatal(err)
	}
	defer unload()
	want, err := mac(ctx, []byte("m"))
	if err != nil {
		t.Fatal(err)
	}
	_, generated, unloadGenerated, err := g.GenerateHMAC(ctx, [][]byte{public})
	if err != nil {
		t.Fatal(err)
	}
	defer unloadGenerated()
	first, err := generated(ctx, []byte("m"))
	if err != nil {
		t.Fatal(err)
	}
	wrapped, err := g.Wrap(ctx, nil, []byte("secret"))
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range []int{0, 1, 0} {
		c.takeAway(t, i)
		if err := signsWith(g); err != nil {
			t.Errorf("without member %d: %v", i+1, err)
		}
		if got, err := mac(ctx, []byte("m")); err != nil || string(got) != string(want) {
			t.Errorf("a loaded key without member %d: %v", i+1, err)
		}
		if got, err := generated(ctx, []byte("m")); err != nil || string(got) != string(first) {
			t.Errorf("a generated key without member %d: %v", i+1, err)
		}
		if got, err := g.Unwrap(ctx, nil, wrapped); err != nil || string(got.Reveal()) != "secret" {
			t.Errorf("Unwrap without member %d: %v", i+1, err)
		}
		if err := g.Check(ctx); err != nil {
			t.Errorf("Check without member %d: %v", i+1, err)
		}
		name := fmt.Sprintf("%d (%s)", i+1, c.cfgs[i].URI)
		if down := g.Down(); len(down) != 1 || down[name] == nil || strings.Count(g.Describe(), "(down: ") != 1 {
			t.Errorf("without member %d: %v; %s", i+1, down, g.Describe())
		}
		c.bring(t, i)
		allUp(t, g)
		if strings.Contains(g.Describe(), "(down: ") {
			t.Error(g.Describe())
		}
	}
	c.takeAway(t, 0)
	c.takeAway(t, 1)
	err = signsWith(g)
	if !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), "member 1") || !strings.Contains(err.Error(), "member 2") {
		t.Errorf("without any member: %v", err)
	}
	if err := g.Check(ctx); !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), "member 1") || !strings.Contains(err.Error(), "member 2") {
		t.Errorf("Check without any member: %v", err)
	}
	c.bring(t, 0)
	c.bring(t, 1)
	allUp(t, g)
	if got, err := mac(ctx, []byte("m")); err != nil || string(got) != string(want) {
		t.Errorf("a loaded key at the end: %v", err)
	}
}

// TestGroupAbsent starts without a member, which comes in later.
func TestGroupAbsent(t *testing.T) {
	for i, other := range []int{1, 0} {
		t.Run(fmt.Sprint(i+1), func(t *testing.T) {
			c := newClones(t)
			c.takeAway(t, i)
			g := openGroup(t, c.cfgs[0], c.cfgs[1])
			if err := signsWith(g); err != nil {
				t.Error(err)
			}
			if len(g.Down()) != 1 || !strings.Contains(g.Describe(), "member "+fmt.Sprint(i+1)) {
				t.Errorf("%v; %s", g.Down(), g.Describe())
			}
			c.bring(t, i)
			allUp(t, g)
			c.takeAway(t, other)
			if err := signsWith(g); err != nil {
				t.Errorf("on the member that came later: %v", err)
			}
		})
	}
}

func TestGroupRefuses(t *testing.T) {
	ctx := context.Background()
	c := newClones(t)
	other := hsmtest.New(t)
	other.Provision(t, other.Config())
	empty := hsmtest.New(t)
	pin, err := secret.Copy([]byte("wrong-pin"))
	if err != nil {
		t.Fatal(err)
	}
	defer pin.Destroy()
	wrong := c.cfgs[1]
	wrong.PIN, wrong.PINFile = pin, ""
	for name, x := range map[string]struct {
		second hsm.Config
		want   error
		says   string
	}{
		"other keys": {other.Config(), hsm.ErrInvalid, "another agreement key"},
		"no keys":    {empty.Config(), hsm.ErrNotProvisioned, ""},
		"wrong PIN":  {wrong, hsm.ErrPIN, ""},
		"not a URI":  {hsm.Config{URI: "x"}, hsm.ErrInvalid, ""},
		"no PIN":     {hsm.Config{URI: c.cfgs[0].URI, PINFile: "/nonexistent", SoftHSMConf: c.cfgs[0].SoftHSMConf}, hsm.ErrPIN, ""},
	} {
		g, err := hsm.OpenGroup(ctx, []hsm.Config{c.cfgs[0], x.second})
		if !errors.Is(err, x.want) || g != nil || !strings.Contains(err.Error(), "member 2") || !strings.Contains(err.Error(), x.says) {
			t.Errorf("%s: %v", name, err)
		}
	}
	c.takeAway(t, 0)
	c.takeAway(t, 1)
	if _, err := hsm.OpenGroup(ctx, c.cfgs[:]); !errors.Is(err, hsm.ErrModule) || !strings.Contains(err.Error(), "member 1") || !strings.Contains(err.Error(), "member 2") {
		t.Errorf("no token at all: %v", err)
	}
	if _, err := hsm.OpenGroup(ctx, nil); !errors.Is(err, hsm.ErrInvalid) {
		t.Errorf("nobody: %v", err)
	}
}

// flaky is a member that fails on command.
type flaky struct {
	hsm.Member
	down   atomic.Bool
	forges bool // unwraps nothing of the others
	calls  atomic.Int64
}

var errFlaky = fmt.Errorf("%w: on command", hsm.ErrUnavailable)

func (f *flaky) Sign(ctx context.Context, digest []byte) ([]byte, error) {
	f.calls.Add(1)
	if f.down.Load() {
		return nil, errFlaky
	}
	return f.Member.Sign(ctx, digest)
}

func (f *flaky) Check(ctx context.Context) error {
	if f.down.Load() {
		return errFlaky
	}
	return f.Member.Check(ctx)
}

func (f *flaky) Unwrap(ctx context.Context, aad, wrapped []byte) (*secret.Bytes, error) {
	if f.forges {
		return nil, hsm.ErrInvalid
	}
	return f.Member.Unwrap(ctx, aad, wrapped)
}

func flakyGroup(t *testing.T, members ...*flaky) (*hsm.Group, error) {
	d := hsmtest.Device(t)
	var openers []hsm.Opener
	for i, m := range members {
		m.Member = keptOpen{d}
		openers = append(openers, hsm.Opener{Name: fmt.Sprint(i), Open: func(context.Context) (hsm.Member, error) { return m, nil }})
	}
	g, err := hsm.NewGroup(context.Background(), openers, nil)
	if err == nil {
		t.Cleanup(func() { _ = g.Close() }) // keptOpen does not fail
	}
	return g, err
}

// keptOpen is a device that several members share.
type keptOpen struct{ *hsm.Device }

func (keptOpen) Close() error { return nil }

func TestGroupOtherWrappingKey(t *testing.T) {
	_, err := flakyGroup(t, &flaky{}, &flaky{forges: true})
	if !errors.Is(err, hsm.ErrInvalid) || !strings.Contains(err.Error(), "member 1: ") || !strings.Contains(err.Error(), "another wrapping key") {
		t.Error(err)
	}
}

// TestGroupStays: calls go to one member as long as it works, and stay with the next
// one when the first is back.
func TestGroupStays(t *testing.T) {
	a, b := &flaky{}, &flaky{}
	g, err := flakyGroup(t, a, b)
	if err != nil {
		t.Fatal(err)
	}
	use := func(wantA, wantB int64) {
		t.Helper()
		if err := signsWith(g); err != nil {
			t.Error(err)
		}
		if gotA, gotB := a.calls.Swap(0), b.calls.Swap(0); gotA != wantA || gotB != wantB {
			t.Errorf("%d and %d calls, want %d and %d", gotA, gotB, wantA, wantB)
		}
	}
	use(1, 0)
	a.down.Store(true)
	use(1, 1)
	use(0, 1)
	a.down.Store(false)
	allUp(t, g)
	use(0, 1)
	b.down.Store(true)
	use(1, 1)
	use(1, 0)
	// What is wrong with the call is not tried elsewhere.
	if _, err := g.Sign(context.Background(), nil); !errors.Is(err, hsm.ErrInvalid) || b.calls.Load() != 0 {
		t.Error(err)
	}
	a.down.Store(true)
	if err := signsWith(g); !errors.Is(err, hsm.ErrUnavailable) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := g.Check(ctx); err == nil {
		t.Error("Check without a member and with a cancelled context")
	}
}

// TestGroupFlapping: members fail and come back under 32 callers. A call fails only
// where each member was down when it was asked.
func TestGroupFlapping(t *testing.T) {
	a, b := &flaky{}, &flaky{}
	g, err := flakyGroup(t, a, b)
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var flapping, callers sync.WaitGroup
	flapping.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
			}
			down, up := a, b
			if i%2 == 1 {
				down, up = b, a
			}
			up.down.Store(false)
			if err := up.Check(context.Background()); err != nil {
				t.Error(err)
			}
			down.down.Store(true)
			_ = g.Check(context.Background()) // one of them is down
			down.down.Store(false)
		}
	})
	for range 32 {
		callers.Go(func() {
			for range 20 {
				if err := signsWith(g); err != nil && !errors.Is(err, hsm.ErrUnavailable) {
					t.Error(err)
				}
			}
		})
	}
	callers.Wait()
	close(stop)
	flapping.Wait()
	allUp(t, g)
	if err := signsWith(g); err != nil {
		t.Error(err)
	}
}

func TestGroupClose(t *testing.T) {
	c := newClones(t)
	g, err := hsm.OpenGroup(context.Background(), c.cfgs[:])
	if err != nil {
		t.Fatal(err)
	}
	c.takeAway(t, 1)
	_ = g.Check(context.Background()) // the second is looked after from now on
	c.bring(t, 1)
	for range 3 {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	}
	if err := signsWith(g); !errors.Is(err, hsm.ErrUnavailable) {
		t.Error(err)
	}
	if err := g.Check(context.Background()); !errors.Is(err, hsm.ErrUnavailable) {
		t.Error(err)
	}
}
