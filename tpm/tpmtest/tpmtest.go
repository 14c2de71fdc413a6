// Package tpmtest gives a test a software TPM of its own, and the means to
// stop, kill and restart it.
package tpmtest

import (
	"context"
	"crypto/ecdh"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/conclave-kms/conclave/tpm"
)

// startTimeout bounds manufacture and start of a software TPM.
const startTimeout = 60 * time.Second

// TPM is a software TPM that belongs to one test.
type TPM struct {
	t    testing.TB
	dir  string
	soft *tpm.SoftTPM
}

// New starts a software TPM on a fresh copy of a manufactured one's state and
// stops it when the test ends. TPMs that live at the same time come from
// different manufactures, so that no two share a seed. Where swtpm is not
// installed the test is skipped, or fails when CI=true.
func New(t testing.TB) *TPM {
	t.Helper()
	dir, err := os.MkdirTemp("", "ctpm") // short: a socket's path has 108 bytes at most
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := &TPM{t: t, dir: dir}
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	made, err := take(ctx)
	if err != nil {
		missing(t, err)
	}
	t.Cleanup(func() { giveBack(made) })
	if err := made.write(p.state()); err != nil {
		t.Fatal(err)
	}
	if err := tpm.NewAuthFile(p.authFile()); err != nil {
		t.Fatal(err)
	}
	p.start()
	t.Cleanup(func() {
		p.Cont()
		if err := p.soft.Stop(); err != nil {
			t.Error(err)
		}
	})
	return p
}

// missing skips or fails a test that cannot have its software TPM.
func missing(t testing.TB, err error) {
	t.Helper()
	if errors.Is(err, tpm.ErrNoSoftTPM) && os.Getenv("CI") != "true" {
		t.Skip(err)
	}
	t.Fatal(err)
}

func (p *TPM) state() string    { return filepath.Join(p.dir, "s") }
func (p *TPM) authFile() string { return filepath.Join(p.dir, "auth") }

func (p *TPM) start() {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	soft, err := tpm.StartSoftTPM(ctx, p.state())
	if err != nil {
		p.t.Fatal(err)
	}
	p.soft = soft
}

// Config returns a configuration for this TPM: P-384, defaults otherwise. The
// TPM is not provisioned yet.
func (p *TPM) Config() tpm.Config {
	return tpm.Config{Path: "unix:" + p.soft.Socket, AuthFile: p.authFile(), Curve: ecdh.P384()}
}

// Open provisions the TPM if that has not been done, opens it, and closes it
// when the test that New was given ends.
func (p *TPM) Open(cfg tpm.Config) *tpm.Device {
	p.t.Helper()
	return p.OpenIn(p.t, cfg)
}

// OpenIn is Open for a subtest: it reports to t and closes the device when t ends.
func (p *TPM) OpenIn(t testing.TB, cfg tpm.Config) *tpm.Device {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), startTimeout)
	defer cancel()
	if err := tpm.Provision(ctx, cfg); err != nil && !errors.Is(err, tpm.ErrProvisioned) {
		t.Fatal(err)
	}
	d, err := tpm.Open(ctx, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = d.Close() })
	return d
}

// Dir is the directory of the TPM's state.
func (p *TPM) Dir() string { return p.state() }

// EndorsementRoot is the DER certificate of the authority that signed the
// certificates of this TPM's endorsement keys.
func (p *TPM) EndorsementRoot() []byte {
	p.t.Helper()
	der, err := tpm.SoftTPMRoot(p.state())
	if err != nil {
		p.t.Fatal(err)
	}
	return der
}

// Kill ends the TPM with SIGKILL, as a power cut would, and waits for its end.
func (p *TPM) Kill() {
	p.t.Helper()
	p.signal(syscall.SIGKILL)
	<-p.soft.Done()
}

// Restart kills the TPM if it runs and starts it again on the same state and
// the same socket.
func (p *TPM) Restart() {
	p.t.Helper()
	p.Kill()
	p.start()
}

// Stop freezes the TPM with SIGSTOP: connections succeed, answers do not come.
// It returns when the process stands still.
func (p *TPM) Stop() {
	p.t.Helper()
	p.signal(syscall.SIGSTOP)
	for {
		err := unix.Waitid(unix.P_PID, p.soft.Pid, nil, unix.WSTOPPED, nil)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			p.t.Error(err)
		}
		return
	}
}

// Cont lets a frozen TPM go on.
func (p *TPM) Cont() { p.signal(syscall.SIGCONT) }

func (p *TPM) signal(sig syscall.Signal) {
	p.t.Helper()
	select {
	case <-p.soft.Done():
		return
	default:
	}
	if err := syscall.Kill(p.soft.Pid, sig); err != nil && !errors.Is(err, syscall.ESRCH) {
		p.t.Error(err)
	}
}
