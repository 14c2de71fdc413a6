package contract_test

import (
	"context"
	"crypto/ecdh"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/hsm/child"
	"github.com/conclave-kms/conclave/hsm/hsmtest"
	"github.com/conclave-kms/conclave/test/contract"
)

const childArgument = "hsm-child"

// TestMain makes the test program its own PKCS#11 process.
func TestMain(m *testing.M) {
	if len(os.Args) == 2 && os.Args[1] == childArgument {
		if err := child.Main(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

func openChild(t *testing.T, cfg hsm.Config) *child.Device {
	t.Helper()
	d, err := child.Open(context.Background(), child.Config{Command: []string{os.Args[0], childArgument}, HSM: cfg})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// killChild ends the process of d and waits until another one works.
func killChild(t *testing.T, d *child.Device) {
	t.Helper()
	pid := d.PID()
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the process starts again", func() error {
		if now := d.PID(); now == 0 || now == pid {
			return fmt.Errorf("process %d, killed was %d", now, pid)
		}
		return d.Check(context.Background())
	})
}

// waitFor polls for what other processes do.
func waitFor(t *testing.T, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(time.Minute)
	for err := f(); err != nil; err = f() {
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(10 * time.Millisecond) // polls a process, no synchronisation
	}
}

func eachCurve(t *testing.T, run func(t *testing.T, c ecdh.Curve)) {
	for _, c := range []ecdh.Curve{ecdh.P384(), ecdh.P256()} {
		t.Run(fmt.Sprint(c), func(t *testing.T) { run(t, c) })
	}
}

// token makes a provisioned token with few loaded keys.
func token(t *testing.T, c ecdh.Curve) (*hsmtest.Token, hsm.Config) {
	t.Helper()
	tok := hsmtest.New(t)
	cfg := tok.Config()
	cfg.Curve, cfg.MaxLoaded = c, 16
	tok.Provision(t, cfg)
	return tok, cfg
}

func TestSoftHSMInAChild(t *testing.T) {
	t.Parallel()
	eachCurve(t, func(t *testing.T, c ecdh.Curve) {
		_, cfg := token(t, c)
		contract.Run(t, func(t *testing.T) contract.Device { return openChild(t, cfg) })
	})
}

func TestSoftHSMInAChildHardware(t *testing.T) {
	t.Parallel()
	eachCurve(t, func(t *testing.T, c ecdh.Curve) {
		_, cfg := token(t, c)
		contract.RunHardware(t, contract.Hardware{
			Open: func(t *testing.T) contract.HardwareDevice { return openChild(t, cfg) },
			Other: func(t *testing.T) contract.HardwareDevice {
				_, cfg := token(t, c)
				return openChild(t, cfg)
			},
			Kind: hsm.ImportKind, WrapHMAC: hsm.WrapHMAC, WrapSigner: hsm.WrapSigner, Loaded: 40, HMAC: true, Signer: true,
			Lose: func(t *testing.T, d contract.HardwareDevice) { killChild(t, d.(*child.Device)) },
		})
	})
}

// clone makes a second token with the same keys, as a vendor's tools do: a copy of the
// token directory behind a copy of the library.
func clone(t *testing.T, tok *hsmtest.Token, cfg hsm.Config) hsm.Config {
	t.Helper()
	dir := t.TempDir()
	if err := os.CopyFS(filepath.Join(dir, "tokens"), os.DirFS(tok.Tokens)); err != nil {
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
	if err := os.WriteFile(conf, []byte("directories.tokendir = "+filepath.Join(dir, "tokens")+"\nobjectstore.backend = file\nlog.level = ERROR\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cfg.URI, cfg.SoftHSMConf = u.String(), conf
	return cfg
}

// group opens a token and its clone as one device.
func group(t *testing.T, cfgs ...hsm.Config) *hsm.Group {
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

func TestGroup(t *testing.T) {
	t.Parallel()
	eachCurve(t, func(t *testing.T, c ecdh.Curve) {
		tok, cfg := token(t, c)
		second := clone(t, tok, cfg)
		contract.Run(t, func(t *testing.T) contract.Device { return group(t, cfg, second) })
	})
}

func TestGroupHardware(t *testing.T) {
	t.Parallel()
	eachCurve(t, func(t *testing.T, c ecdh.Curve) {
		tok, cfg := token(t, c)
		second := clone(t, tok, cfg)
		contract.RunHardware(t, contract.Hardware{
			Open: func(t *testing.T) contract.HardwareDevice { return group(t, cfg, second) },
			Other: func(t *testing.T) contract.HardwareDevice {
				tok, cfg := token(t, c)
				return group(t, cfg, clone(t, tok, cfg))
			},
			Kind: hsm.ImportKind, WrapHMAC: hsm.WrapHMAC, WrapSigner: hsm.WrapSigner, Loaded: 40, HMAC: true, Signer: true,
			Lose: func(t *testing.T, _ contract.HardwareDevice) { closeAllSessions(t, tok) },
		})
	})
}

// TestGroupOfChildren runs the suite on a token and its clone, each with its library
// in a process of its own, of which one is killed.
func TestGroupOfChildren(t *testing.T) {
	t.Parallel()
	c := ecdh.P256()
	open := func(t *testing.T, members ...hsm.Config) (*hsm.Group, []*child.Device) {
		devices := make([]*child.Device, len(members))
		var openers []hsm.Opener
		for i, m := range members {
			openers = append(openers, hsm.Opener{Name: fmt.Sprint(i), Open: func(ctx context.Context) (hsm.Member, error) {
				d, err := child.Open(ctx, child.Config{Command: []string{os.Args[0], childArgument}, HSM: m})
				devices[i] = d
				return d, err
			}})
		}
		g, err := hsm.NewGroup(context.Background(), openers, nil)
		if err != nil {
			t.Fatal(err)
		}
		return g, devices
	}
	tok, cfg := token(t, c)
	second := clone(t, tok, cfg)
	var processes []*child.Device
	contract.RunHardware(t, contract.Hardware{
		Open: func(t *testing.T) contract.HardwareDevice {
			g, devices := open(t, cfg, second)
			processes = devices
			return g
		},
		Other: func(t *testing.T) contract.HardwareDevice {
			_, cfg := token(t, c)
			return openChild(t, cfg)
		},
		Kind: hsm.ImportKind, WrapHMAC: hsm.WrapHMAC, WrapSigner: hsm.WrapSigner, Loaded: 40, HMAC: true, Signer: true,
		Lose: func(t *testing.T, _ contract.HardwareDevice) {
			// Nobody waits for the first: the group goes on with the second.
			waitFor(t, "both processes are there", func() error {
				if processes[0].PID() == 0 || processes[1].PID() == 0 {
					return fmt.Errorf("processes %d, %d", processes[0].PID(), processes[1].PID())
				}
				return syscall.Kill(processes[0].PID(), syscall.SIGKILL)
			})
		},
	})
}
