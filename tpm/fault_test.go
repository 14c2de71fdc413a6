package tpm_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"
	"github.com/google/go-tpm/tpm2/transport/linuxudstpm"

	"github.com/conclave-kms/conclave/tpm"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

// direct runs a command on the software TPM beside the device.
func direct[R any, C tpm2.Command[R, *R]](t *testing.T, cfg tpm.Config, cmd C) *R {
	t.Helper()
	var link transport.TPMCloser
	eventually(t, func() (err error) { // the queue of connections may be full for a moment
		link, err = linuxudstpm.Open(strings.TrimPrefix(cfg.Path, "unix:"))
		return err
	})
	defer link.Close()
	rsp, err := cmd.Execute(link)
	if err != nil {
		t.Fatal(err)
	}
	return rsp
}

// loaded counts the transient objects and sessions in the TPM.
func loaded(t *testing.T, cfg tpm.Config) int {
	t.Helper()
	n := 0
	for _, first := range []uint32{0x80000000, 0x02000000} {
		rsp := direct(t, cfg, tpm2.GetCapability{Capability: tpm2.TPMCapHandles, Property: first, PropertyCount: 64})
		h, err := rsp.CapabilityData.Data.Handles()
		if err != nil {
			t.Fatal(err)
		}
		n += len(h.Handle)
	}
	return n
}

// dictionaryAttacks reads the TPM's count of failed authorizations.
func dictionaryAttacks(t *testing.T, cfg tpm.Config) uint32 {
	t.Helper()
	rsp := direct(t, cfg, tpm2.GetCapability{
		Capability: tpm2.TPMCapTPMProperties, Property: uint32(tpm2.TPMPTLockoutCounter), PropertyCount: 1,
	})
	p, err := rsp.CapabilityData.Data.TPMProperties()
	if err != nil || len(p.TPMProperty) != 1 {
		t.Fatal(err, len(p.TPMProperty))
	}
	return p.TPMProperty[0].Value
}

// everything uses each operation once.
func everything(ctx context.Context, d *tpm.Device) error {
	if z, err := d.ECDH(ctx, d.AgreementKey()); err != nil || len(z) != 48 {
		return errors.Join(errors.New("ECDH"), err)
	}
	if _, err := d.Sign(ctx, make([]byte, 48)); err != nil {
		return err
	}
	blob, err := d.Wrap(ctx, []byte("aad"), []byte("key"))
	if err != nil {
		return err
	}
	key, err := d.Unwrap(ctx, []byte("aad"), blob)
	if err != nil {
		return err
	}
	defer key.Destroy()
	if !bytes.Equal(key.Reveal(), []byte("key")) {
		return errors.New("another key came back")
	}
	if err := d.Random(ctx, make([]byte, 100)); err != nil {
		return err
	}
	return d.Check(ctx)
}

func TestNoLeftovers(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	cfg := p.Config()
	before := loaded(t, cfg)
	d := p.Open(cfg)
	for range 5 {
		if err := everything(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		if _, err := d.Unwrap(t.Context(), nil, make([]byte, 10)); err == nil {
			t.Fatal("nonsense opened")
		}
	}
	blob := mustWrap(t, d, []byte("a"), []byte("key"))
	refused(t, "other aad", d, []byte("b"), blob)
	blob[len(blob)-1] ^= 1
	refused(t, "altered", d, []byte("a"), blob)
	if after := loaded(t, cfg); after != before || after != 0 {
		t.Errorf("%d transient objects and sessions before, %d after", before, after)
	}
}

// TestFullOfLeftovers: sessions that a killed process left do not lock us out.
func TestFullOfLeftovers(t *testing.T) {
	p := tpmtest.New(t)
	cfg := p.Config()
	d := p.Open(cfg)
	for range 3 {
		direct(t, cfg, tpm2.StartAuthSession{
			TPMKey: tpm2.TPMRHNull, Bind: tpm2.TPMRHNull, NonceCaller: tpm2.TPM2BNonce{Buffer: make([]byte, 16)},
			SessionType: tpm2.TPMSEHMAC, Symmetric: tpm2.TPMTSymDef{Algorithm: tpm2.TPMAlgNull}, AuthHash: tpm2.TPMAlgSHA256,
		})
	}
	if n := loaded(t, cfg); n != 3 {
		t.Fatalf("%d sessions are left", n)
	}
	if err := everything(t.Context(), d); err != nil {
		t.Error(err)
	}
	if n := loaded(t, cfg); n != 0 {
		t.Errorf("%d sessions are left", n)
	}
}

// TestKilled: after kill -9 and a restart the device works on without reopening.
func TestKilled(t *testing.T) {
	p := tpmtest.New(t)
	d := p.Open(p.Config())
	blob := mustWrap(t, d, []byte("aad"), []byte("key"))
	for range 2 {
		p.Kill()
		start := time.Now()
		if err := d.Check(t.Context()); !errors.Is(err, tpm.ErrUnavailable) {
			t.Fatalf("dead TPM: %v, want ErrUnavailable", err)
		}
		if took := time.Since(start); took > 5*time.Second {
			t.Errorf("a dead TPM was noticed after %v", took)
		}
		p.Restart()
		if err := everything(t.Context(), d); err != nil {
			t.Fatalf("after the restart: %v", err)
		}
		key, err := d.Unwrap(t.Context(), []byte("aad"), blob)
		if err != nil {
			t.Fatalf("a key wrapped before the restart: %v", err)
		}
		key.Destroy()
	}
	p.Restart() // unnoticed between two calls
	if err := everything(t.Context(), d); err != nil {
		t.Fatalf("after an unnoticed restart: %v", err)
	}
}

// TestKilledDuringCalls: calls in progress fail with ErrUnavailable and no other
// error, and all works again afterwards.
func TestKilledDuringCalls(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	d := p.Open(p.Config())
	started, stop := make(chan struct{}, 8), make(chan struct{})
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			started <- struct{}{}
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := everything(context.Background(), d); err != nil && !errors.Is(err, tpm.ErrUnavailable) {
					t.Errorf("while the TPM dies: %v", err)
					return
				}
			}
		})
	}
	for range 8 {
		<-started
	}
	for range 3 {
		p.Restart()
		eventually(t, func() error { return d.Check(t.Context()) })
	}
	close(stop)
	wg.Wait()
	if err := everything(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	if n := loaded(t, p.Config()); n != 0 {
		t.Errorf("%d transient objects and sessions are left", n)
	}
}

// eventually repeats a call on the device until it succeeds.
func eventually(t *testing.T, try func() error) {
	t.Helper()
	end := time.Now().Add(20 * time.Second)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(end) {
			t.Fatal(err)
		}
	}
}

// provisioned opens a TPM with a short CallTimeout that would not do for making keys.
func provisioned(p *tpmtest.TPM, cfg tpm.Config) *tpm.Device {
	_ = p.Open(p.Config()).Close()
	return p.Open(cfg)
}

// TestHung: no call waits for a frozen TPM beyond its deadline, queued calls
// fail with the one they wait for, later ones at once, and the TPM is used again
// when it goes on.
func TestHung(t *testing.T) {
	p := tpmtest.New(t)
	cfg := p.Config()
	cfg.CallTimeout = time.Second
	d := provisioned(p, cfg)
	blob := mustWrap(t, d, nil, []byte("key"))

	p.Stop()
	start := time.Now()
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			if _, err := d.Unwrap(context.Background(), nil, blob); !errors.Is(err, tpm.ErrUnavailable) {
				t.Errorf("hung TPM: %v, want ErrUnavailable", err)
			}
		})
	}
	wg.Wait()
	if took := time.Since(start); took > 4*cfg.CallTimeout {
		t.Errorf("32 calls on a hung TPM took %v", took)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
	defer cancel()
	start = time.Now()
	for range 100 {
		err := d.Random(t.Context(), make([]byte, 8))
		if !errors.Is(err, tpm.ErrUnavailable) || !strings.Contains(err.Error(), "the TPM hangs") {
			t.Fatalf("after the hung calls: %v, want a refusal that names the cause", err)
		}
	}
	if took := time.Since(start); took > cfg.CallTimeout*9/10 {
		t.Errorf("100 refusals took %v", took)
	}
	start = time.Now()
	err := d.Check(ctx)
	if !errors.Is(err, tpm.ErrUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the caller's deadline: %v", err)
	}
	if took := time.Since(start); took > cfg.CallTimeout*9/10 {
		t.Errorf("the caller's deadline of 20ms took %v", took)
	}

	p.Cont()
	eventually(t, func() error { return d.Check(t.Context()) }) // the one before may still be under way
	if err := everything(t.Context(), d); err != nil {
		t.Errorf("after the first answer: %v", err)
	}
	if n := loaded(t, cfg); n != 0 {
		t.Errorf("%d transient objects and sessions are left", n)
	}
}

func TestCloseWhileHung(t *testing.T) {
	p := tpmtest.New(t)
	cfg := p.Config()
	cfg.CallTimeout = time.Second
	d := provisioned(p, cfg)
	p.Stop()
	if err := d.Close(); !errors.Is(err, tpm.ErrUnavailable) {
		t.Errorf("Close: %v, want ErrUnavailable", err)
	}
	if err := d.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if _, err := d.Sign(t.Context(), make([]byte, 48)); !errors.Is(err, tpm.ErrUnavailable) {
		t.Errorf("after Close: %v", err)
	}
	if _, err := tpm.Open(t.Context(), cfg); !errors.Is(err, tpm.ErrUnavailable) {
		t.Errorf("opening a hung TPM: %v, want ErrUnavailable", err)
	}
}

func TestConcurrent(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	cfg := p.Config()
	cfg.CallTimeout = time.Minute
	d := p.Open(cfg)
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			for range 3 {
				if err := everything(context.Background(), d); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if n := loaded(t, cfg); n != 0 {
		t.Errorf("%d transient objects and sessions are left", n)
	}
}

// TestTwoDevices: two processes may share one software TPM.
func TestTwoDevices(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	a, b := p.Open(p.Config()), p.Open(p.Config())
	var wg sync.WaitGroup
	for _, d := range []*tpm.Device{a, b} {
		wg.Go(func() {
			for range 5 {
				if err := everything(context.Background(), d); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

// TestCancelled: a caller that gives up gets its answer at once, and the call
// that it started does no harm.
func TestCancelled(t *testing.T) {
	p := tpmtest.New(t)
	d := p.Open(p.Config())
	for i := range 50 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i)*200*time.Microsecond)
		if err := everything(ctx, d); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("cancelled call: %v", err)
		}
		cancel()
	}
	if err := everything(t.Context(), d); err != nil {
		t.Fatal(err)
	}
	if n := loaded(t, p.Config()); n != 0 {
		t.Errorf("%d transient objects and sessions are left", n)
	}
}

// TestExchanged: another TPM behind the same path is noticed, even when its
// keys have the same authorization value.
func TestExchanged(t *testing.T) {
	p, q := tpmtest.New(t), tpmtest.New(t)
	link := filepath.Join(filepath.Dir(p.Dir()), "link")
	cfg, other := p.Config(), q.Config()
	other.AuthFile = cfg.AuthFile
	q.Open(other)
	point := func(at tpm.Config) {
		t.Helper()
		_ = os.Remove(link)
		if err := os.Symlink(strings.TrimPrefix(at.Path, "unix:"), link); err != nil {
			t.Fatal(err)
		}
	}
	point(cfg)
	through := cfg
	through.Path = "unix:" + link
	d := p.Open(through)
	point(other)
	if _, err := d.ECDH(t.Context(), d.AgreementKey()); err == nil {
		t.Error("ECDH with another TPM's key succeeded")
	}
	if err := d.Check(t.Context()); !errors.Is(err, tpm.ErrUnsafe) {
		t.Errorf("Check: %v, want ErrUnsafe", err)
	}
	q.Kill()
	_ = d.Check(t.Context())
	q.Restart()
	if _, err := d.ECDH(t.Context(), d.AgreementKey()); !errors.Is(err, tpm.ErrUnsafe) {
		t.Errorf("after a reconnect to another TPM: %v, want ErrUnsafe", err)
	}
	point(cfg)
	eventually(t, func() error { return everything(t.Context(), d) })
}
