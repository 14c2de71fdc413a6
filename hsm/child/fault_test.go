package child_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/hsm/child"
	"github.com/conclave-kms/conclave/hsm/child/shimtest"
	"github.com/conclave-kms/conclave/hsm/hsmtest"
	"github.com/miekg/pkcs11"
)

// shimmed is a provisioned token behind a module that misbehaves on command.
func shimmed(t *testing.T) (*hsmtest.Token, hsm.Config, *shimtest.Shim) {
	t.Helper()
	tok, cfg := provisioned(t)
	u, err := hsm.ParseURI(tok.ChildURI)
	if err != nil {
		t.Fatal(err)
	}
	shim := shimtest.Build(t, u.ModulePath)
	u.ModulePath = shim.Path
	cfg.URI = u.String()
	return tok, cfg, shim
}

func digest() []byte { return make([]byte, 48) }

// recovers waits until the device works, with the keys that it had.
func recovers(t *testing.T, d *child.Device, mac func(context.Context, []byte) ([]byte, error), check func(func(context.Context, []byte) ([]byte, error)) error) {
	t.Helper()
	eventually(t, "recovery", func() error { return d.Check(context.Background()) })
	if _, err := d.Sign(context.Background(), digest()); err != nil {
		t.Errorf("Sign afterwards: %v", err)
	}
	if err := check(mac); err != nil {
		t.Errorf("a loaded key afterwards: %v", err)
	}
}

// TestCrash: the library dies of a signal in a call. All calls under way and the next
// ones fail and say why, and then everything works again, loaded keys too.
func TestCrash(t *testing.T) {
	_, cfg, shim := shimmed(t)
	d, log := open(t, cfg)
	blob, check := hmacKey(t, d)
	mac, unload, err := d.LoadHMAC(context.Background(), blob)
	if err != nil {
		t.Fatal(err)
	}
	defer unload()
	for _, c := range []struct {
		name, says string
		set        func(testing.TB, string)
	}{{"SIGSEGV", "SIGSEGV", shim.Crash}, {"SIGABRT", "SIGABRT", shim.Abort}} {
		t.Run(c.name, func(t *testing.T) {
			agreement := d.AgreementKey()
			c.set(t, "C_Sign")
			_, err := d.Sign(context.Background(), digest())
			if !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("the call: %v", err)
			}
			shim.Behave(t)
			recovers(t, d, mac, check)
			if !d.AgreementKey().Equal(agreement) {
				t.Error("another agreement key")
			}
			if !strings.Contains(log.String(), c.says) {
				t.Errorf("the log does not name the signal: %s", log)
			}
			if strings.Contains(log.String(), "goroutine") || strings.Contains(log.String(), "rip") {
				t.Errorf("a trace was logged: %s", log)
			}
		})
	}
}

// TestCrashUnderLoad kills the process under 32 callers: each call works or fails as
// it should, and none hangs.
func TestCrashUnderLoad(t *testing.T) {
	_, cfg := provisioned(t)
	d, _ := open(t, cfg)
	blob, check := hmacKey(t, d)
	mac, unload, err := d.LoadHMAC(context.Background(), blob)
	if err != nil {
		t.Fatal(err)
	}
	defer unload()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := check(mac); err != nil && !errors.Is(err, hsm.ErrUnavailable) {
					t.Errorf("a call: %v", err)
					return
				}
			}
		})
	}
	for range 3 {
		eventually(t, "a process to kill", func() error {
			if err := d.Check(context.Background()); err != nil {
				return err
			}
			return syscall.Kill(d.PID(), syscall.SIGKILL)
		})
	}
	eventually(t, "recovery", func() error { return check(mac) })
	close(stop)
	wg.Wait()
}

// TestHang: a call that never returns is given up at its deadline, the process is
// killed, and a new one works.
func TestHang(t *testing.T) {
	_, cfg, shim := shimmed(t)
	cfg.CallTimeout = 3 * time.Second
	d, log := open(t, cfg)
	blob, check := hmacKey(t, d)
	mac, unload, err := d.LoadHMAC(context.Background(), blob)
	if err != nil {
		t.Fatal(err)
	}
	defer unload()
	pid := d.PID()
	shim.Hang(t, "C_Sign")
	begin := time.Now()
	if _, err := d.Sign(context.Background(), digest()); !errors.Is(err, hsm.ErrUnavailable) || !strings.Contains(err.Error(), "no answer within 3s") {
		t.Errorf("the call: %v", err)
	}
	if took := time.Since(begin); took > 10*time.Second {
		t.Errorf("it took %v", took)
	}
	shim.Behave(t)
	recovers(t, d, mac, check)
	if d.PID() == pid && strings.Contains(log.String(), "hung") {
		t.Error("the process is the same")
	}
}

// TestHangForEver: as long as the library hangs, all calls fail within their
// deadlines, and short contexts are kept.
func TestHangForEver(t *testing.T) {
	_, cfg, shim := shimmed(t)
	cfg.CallTimeout = 3 * time.Second
	d, log := open(t, cfg)
	blob, check := hmacKey(t, d)
	mac, unload, err := d.LoadHMAC(context.Background(), blob)
	if err != nil {
		t.Fatal(err)
	}
	defer unload()
	shim.Hang(t, "*")
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	if err := d.Check(ctx); !errors.Is(err, hsm.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a short context: %v", err)
	}
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			if _, err := d.Sign(context.Background(), digest()); !errors.Is(err, hsm.ErrUnavailable) {
				t.Errorf("Sign: %v", err)
			}
		})
	}
	wg.Wait()
	eventually(t, "the process is killed", func() error {
		if !strings.Contains(log.String(), "hung in the library") {
			return errors.New(log.String())
		}
		return nil
	})
	if err := d.Check(context.Background()); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("Check: %v", err)
	}
	shim.Behave(t)
	recovers(t, d, mac, check)
}

// TestStopped: a process that does not run at all is killed too.
func TestStopped(t *testing.T) {
	_, cfg := provisioned(t)
	cfg.CallTimeout = 3 * time.Second
	d, _ := open(t, cfg)
	if err := syscall.Kill(d.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	eventually(t, "it stops", func() error {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", d.PID()))
		if err == nil && !strings.Contains(string(b), ") T ") {
			err = errors.New(string(b))
		}
		return err
	})
	// More than the socket's buffers hold.
	var wg sync.WaitGroup
	for range 16 {
		wg.Go(func() {
			if _, err := d.Wrap(context.Background(), make([]byte, hsm.MaxAAD), make([]byte, 32)); !errors.Is(err, hsm.ErrUnavailable) {
				t.Errorf("Wrap: %v", err)
			}
		})
	}
	wg.Wait()
	eventually(t, "recovery", func() error { return d.Check(context.Background()) })
}

// TestOpenFails: every reason keeps its identity.
func TestOpenFails(t *testing.T) {
	tok, cfg := provisioned(t)
	empty := hsmtest.New(t)
	with := func(f func(*hsm.Config)) hsm.Config {
		c := cfg
		f(&c)
		return c
	}
	wrong := filepath.Join(t.TempDir(), "pin")
	if err := os.WriteFile(wrong, []byte("wrong-pin"), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		cfg  hsm.Config
		want error
	}{
		"no URI":          {with(func(c *hsm.Config) { c.URI = "" }), hsm.ErrInvalid},
		"no module":       {with(func(c *hsm.Config) { c.URI = strings.Replace(c.URI, ".so", ".none", 1) }), hsm.ErrModule},
		"no token":        {with(func(c *hsm.Config) { c.URI = strings.Replace(c.URI, tok.Label, "none", 1) }), hsm.ErrTokenNotFound},
		"wrong PIN":       {with(func(c *hsm.Config) { c.PINFile = wrong }), hsm.ErrPIN},
		"no PIN file":     {with(func(c *hsm.Config) { c.PINFile = "/nonexistent" }), hsm.ErrPIN},
		"not provisioned": {empty.Config(), hsm.ErrNotProvisioned},
		"other label":     {with(func(c *hsm.Config) { c.Label = "other" }), hsm.ErrNotProvisioned},
	} {
		c2, _ := inChild(c.cfg)
		if d, err := child.Open(context.Background(), c2); !errors.Is(err, c.want) || d != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	c, _ := inChild(cfg)
	c.Command = nil
	if _, err := child.Open(context.Background(), c); !errors.Is(err, hsm.ErrInvalid) {
		t.Errorf("no command: %v", err)
	}
	for _, command := range [][]string{{"/nonexistent"}, {"/bin/true"}, {"/bin/cat"}, {"/bin/sh", "-c", "echo hello >&3"}} {
		c.Command = command
		if _, err := child.Open(context.Background(), c); !errors.Is(err, hsm.ErrUnavailable) {
			t.Errorf("%v: %v", command, err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	c, _ = inChild(cfg)
	if _, err := child.Open(ctx, c); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestTokenGone: the token directory is moved away while the process starts again,
// and comes back.
func TestTokenGone(t *testing.T) {
	tok, cfg := provisioned(t)
	d, log := open(t, cfg)
	away := tok.Tokens + ".away"
	if err := os.Rename(tok.Tokens, away); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(d.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a start that fails", func() error {
		if !strings.Contains(log.String(), "does not start") {
			return errors.New(log.String())
		}
		return nil
	})
	if err := d.Check(context.Background()); !errors.Is(err, hsm.ErrUnavailable) || errors.Is(err, hsm.ErrTokenNotFound) {
		t.Errorf("without a token: %v", err)
	}
	if err := os.Rename(away, tok.Tokens); err != nil {
		t.Fatal(err)
	}
	eventually(t, "recovery", func() error { return d.Check(context.Background()) })
}

// TestOtherKeys: what is found at a restart must be the same device.
func TestOtherKeys(t *testing.T) {
	tok, cfg := provisioned(t)
	d, log := open(t, cfg)
	other := hsmtest.New(t)
	other.Provision(t, other.Config())
	swap(t, tok, other)
	if err := syscall.Kill(d.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "a start that fails", func() error {
		if !strings.Contains(log.String(), "does not start") {
			return errors.New(log.String())
		}
		return nil
	})
	if err := d.Check(context.Background()); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("with another token: %v", err)
	}
	swap(t, tok, other)
	eventually(t, "recovery", func() error { return d.Check(context.Background()) })
}

// swap exchanges the token directories of two tokens.
func swap(t *testing.T, a, b *hsmtest.Token) {
	t.Helper()
	for _, mv := range [][2]string{{a.Tokens, a.Tokens + ".x"}, {b.Tokens, a.Tokens}, {a.Tokens + ".x", b.Tokens}} {
		if err := os.Rename(mv[0], mv[1]); err != nil {
			t.Fatal(err)
		}
	}
}

// TestStderr: what the process writes is logged, fit for a log.
func TestStderr(t *testing.T) {
	log := &logged{}
	c, _ := inChild(hsm.Config{})
	_, cfg := provisioned(t)
	c.HSM, c.Log = cfg, newLog(log)
	c.Command = []string{"/bin/sh", "-c", `printf 'one\033[31m\001two\nno end' >&2; exec "$0" "$@"`, os.Args[0], childArgument}
	d, err := child.Open(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if s := log.String(); !strings.Contains(s, "one?[31m?two") || !strings.Contains(s, "no end") {
		t.Errorf("logged: %s", s)
	}
}

// TestProcess: nothing of the configuration is in the arguments or the environment of
// the process, its memory is closed, and it has no descriptor but its own.
func TestProcess(t *testing.T) {
	tok, cfg := provisioned(t)
	d, _ := open(t, cfg)
	pin, err := os.ReadFile(tok.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{"cmdline", "environ"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", d.PID(), file))
		if err != nil && !errors.Is(err, os.ErrPermission) {
			t.Fatal(err)
		}
		if strings.Contains(string(b), strings.TrimSpace(string(pin))) || strings.Contains(string(b), tok.Label) {
			t.Errorf("%s has the PIN or the token", file)
		}
	}
	if name, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", d.PID())); err != nil || string(name) != "conclaved-hsm\n" {
		t.Errorf("its name is %q, %v", name, err)
	}
	st, err := os.Stat(fmt.Sprintf("/proc/%d/mem", d.PID()))
	if err != nil {
		t.Fatal(err)
	}
	// What is not dumpable belongs to root.
	if owner := st.Sys().(*syscall.Stat_t).Uid; owner != 0 {
		t.Errorf("the memory belongs to user %d", owner)
	}
	limits, err := os.ReadFile(fmt.Sprintf("/proc/%d/limits", d.PID()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(limits)) {
		if f := strings.Fields(line); strings.HasPrefix(line, "Max core file size") && (f[4] != "0" || f[5] != "0") {
			t.Errorf("core dumps are possible: %s", line)
		}
	}
}

// TestParentDies: a node that is killed takes the process with it, a busy one too.
func TestParentDies(t *testing.T) {
	_, cfg, shim := shimmed(t)
	for _, busy := range []bool{false, true} {
		cmd := exec.CommandContext(t.Context(), os.Args[0], parentArgument, cfg.URI, cfg.PINFile, cfg.SoftHSMConf)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		var pid int
		if _, err := fmt.Fscan(out, &pid); err != nil {
			t.Fatal(err)
		}
		if busy {
			shim.Hang(t, "*")
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // it was killed
		eventually(t, "the process ends", func() error {
			b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err != nil || strings.Contains(string(b), ") Z ") {
				return nil
			}
			return errors.New(string(b))
		})
		shim.Behave(t)
	}
}

// TestNewPIN: the PIN is changed in the token and then in its file. What was refused
// is not sent again.
func TestNewPIN(t *testing.T) {
	tok, cfg := provisioned(t)
	d, log := open(t, cfg)
	setPIN(t, tok, "654321-new")
	if err := syscall.Kill(d.PID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the old PIN is refused", func() error {
		if err := d.Check(context.Background()); !errors.Is(err, hsm.ErrPIN) {
			return fmt.Errorf("%w; %s", err, log)
		}
		return nil
	})
	starts := strings.Count(log.String(), "does not start")
	if err := os.WriteFile(tok.PINFile, []byte("654321-new\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	eventually(t, "recovery", func() error { return d.Check(context.Background()) })
	if starts != 1 || strings.Count(log.String(), "does not start") != 1 {
		t.Errorf("started more than once with the old PIN: %s", log)
	}
}

// setPIN changes the user PIN of the token behind the device's back.
func setPIN(t *testing.T, tok *hsmtest.Token, pin string) {
	t.Helper()
	u, err := hsm.ParseURI(tok.URI) // the copy of the library for this process
	if err != nil {
		t.Fatal(err)
	}
	old, err := os.ReadFile(tok.PINFile)
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("SOFTHSM2_CONF", tok.ConfFile)
	p11 := pkcs11.New(u.ModulePath)
	if p11 == nil {
		t.Fatal("the library cannot be loaded")
	}
	defer p11.Destroy()
	if err := p11.Initialize(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = p11.Finalize() }() // nothing is open
	slots, err := p11.GetSlotList(true)
	if err != nil {
		t.Fatal(err)
	}
	for _, slot := range slots {
		info, err := p11.GetTokenInfo(slot)
		if err != nil || info.Label != tok.Label {
			continue
		}
		s, err := p11.OpenSession(slot, pkcs11.CKF_SERIAL_SESSION|pkcs11.CKF_RW_SESSION)
		if err != nil {
			t.Fatal(err)
		}
		if err := p11.Login(s, pkcs11.CKU_USER, strings.TrimSpace(string(old))); err != nil {
			t.Fatal(err)
		}
		if err := p11.SetPIN(s, strings.TrimSpace(string(old)), pin); err != nil {
			t.Fatal(err)
		}
		return
	}
	t.Fatal("the token is not there")
}
