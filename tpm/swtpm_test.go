package tpm_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/conclave-kms/conclave/tpm"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

// nodeConfig makes the test binary a node that provisions and uses the TPM of that
// configuration (path and authorization file, two lines) until it is killed.
const nodeConfig = "CONCLAVE_TEST_TPM_NODE"

// parentDir makes the test binary a process that starts the software TPM in
// that directory, prints its process id and waits for the end of its input.
const parentDir = "CONCLAVE_TEST_SOFTTPM_PARENT"

func TestMain(m *testing.M) {
	if dir := os.Getenv(parentDir); dir != "" {
		s, err := tpm.StartSoftTPM(context.Background(), dir)
		if err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println(s.Pid)
		_, _ = io.Copy(io.Discard, os.Stdin)
		os.Exit(0)
	}
	if cfg := os.Getenv(nodeConfig); cfg != "" {
		err := runNode(cfg)
		fmt.Println(err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// TestSoftTPMDiesWithParent: kill -9 of the parent ends the software TPM too.
func TestSoftTPMDiesWithParent(t *testing.T) {
	p := tpmtest.New(t)
	p.Kill() // leaves its state to the child process
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), parentDir+"="+p.Dir())
	if _, err := cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Sscan(line, &pid); err != nil {
		t.Fatalf("the child process says %q", line)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	end := time.Now().Add(20 * time.Second)
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, int(time.Until(end).Milliseconds()))
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n != 1 {
			t.Fatalf("swtpm outlives its parent: %d, %v", n, err)
		}
		return
	}
}

// TestSoftTPMKeepsState: set up again and started again, also where the path is
// too long for a socket, the keys are those of before.
func TestSoftTPMKeepsState(t *testing.T) {
	ctx := t.Context()
	dir := filepath.Join(t.TempDir(), strings.Repeat("long", 25))
	auth := filepath.Join(t.TempDir(), "auth")
	if err := tpm.NewAuthFile(auth); err != nil {
		t.Fatal(err)
	}
	var key interface{ Bytes() []byte }
	for i := range 2 {
		if err := tpm.SetupSoftTPM(ctx, dir); err != nil {
			if errors.Is(err, tpm.ErrNoSoftTPM) {
				tpmtest.New(t) // skips or fails
			}
			t.Fatal(err)
		}
		s, err := tpm.StartSoftTPM(ctx, dir)
		if err != nil {
			t.Fatal(err)
		}
		cfg := tpm.Config{Path: "unix:" + s.Socket, AuthFile: auth}
		if i == 0 {
			if err := tpm.Provision(ctx, cfg); err != nil {
				t.Fatal(err)
			}
		}
		d, err := tpm.Open(ctx, cfg)
		if err != nil {
			t.Fatal(err)
		}
		if key == nil {
			key = d.AgreementKey()
		} else if string(key.Bytes()) != string(d.AgreementKey().Bytes()) {
			t.Error("another agreement key after a restart")
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		for range 2 {
			if err := s.Stop(); err != nil {
				t.Error(err)
			}
		}
		if _, err := os.Stat(s.Socket); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the socket is left: %v", err)
		}
	}
}

func TestSoftTPMRefusals(t *testing.T) {
	ctx := t.Context()
	tpmtest.New(t) // swtpm is there
	if _, err := tpm.StartSoftTPM(ctx, t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("starting what was not set up: %v", err)
	}
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	dir := t.TempDir()
	if err := tpm.SetupSoftTPM(cancelled, dir); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled set-up: %v", err)
	}
	if _, err := tpm.StartSoftTPM(ctx, dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("starting a half-made TPM: %v", err)
	}
	t.Setenv("PATH", t.TempDir())
	_, startErr := tpm.StartSoftTPM(ctx, dir)
	for _, err := range []error{tpm.SetupSoftTPM(ctx, dir), startErr} {
		if !errors.Is(err, tpm.ErrNoSoftTPM) || !strings.Contains(err.Error(), "swtpm-tools") {
			t.Errorf("without swtpm: %v", err)
		}
	}
}
