package tpm

import (
	"bytes"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// ErrNoSoftTPM means that swtpm or swtpm_setup is not installed.
var ErrNoSoftTPM = errors.New("swtpm or swtpm_setup not found: install the Debian packages swtpm and swtpm-tools")

const (
	softState  = "tpm2-00.permall"
	softLog    = "swtpm.log"
	softSocket = "swtpm.sock"
	// maxSocketPath leaves room in the 108 bytes of sockaddr_un.
	maxSocketPath = 100
	softStopGrace = 5 * time.Second
	// swtpm logs a line for every connection and cannot be told not to.
	softLogMax   = 1 << 20
	softLogCheck = time.Minute
)

// SoftTPM is a running software TPM. Its private state is protected by file
// permissions alone: it is for development and tests.
type SoftTPM struct {
	// Socket is the path of the Unix socket; "unix:"+Socket is a Config.Path.
	Socket string
	// Pid is the process id of swtpm.
	Pid int

	ownDir string // a directory made for the socket alone
	done   chan struct{}
	err    error // of the process; set before done is closed
}

// SetupSoftTPM manufactures a software TPM in dir (mode 0700, made if absent):
// endorsement keys, and certificates for them from a certificate authority of
// its own in dir. A dir that holds a TPM already stays as it is. ErrNoSoftTPM
// says what to install.
func SetupSoftTPM(ctx context.Context, dir string) error {
	setup, err := findTools()
	if err != nil {
		return err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return fmt.Errorf("tpm: software TPM: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("tpm: software TPM: %w", err)
	}
	if _, err := os.Stat(filepath.Join(dir, softState)); err == nil {
		return nil
	}
	conf, err := writeSetupConfig(dir)
	if err != nil {
		return fmt.Errorf("tpm: software TPM: %w", err)
	}
	var out bytes.Buffer
	cmd := exec.CommandContext(ctx, setup, "--tpm2", "--tpmstate", dir, "--config", conf,
		"--create-ek-cert", "--create-platform-cert", "--lock-nvram", "--overwrite")
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) } // with the swtpm that it starts
	cmd.WaitDelay = softStopGrace
	if err := cmd.Run(); err != nil {
		_ = os.Remove(filepath.Join(dir, softState)) // half made
		return fmt.Errorf("tpm: swtpm_setup: %w: %s", err, lastLines(out.Bytes()))
	}
	return nil
}

// SoftTPMRoot returns the certificate, in DER, of the authority that signed the
// endorsement key certificates of the software TPM in dir: what a maker of real
// TPMs publishes. Each software TPM has an authority of its own.
func SoftTPMRoot(dir string) ([]byte, error) {
	text, err := os.ReadFile(filepath.Join(dir, "ca", "issuercert.pem"))
	if err != nil {
		return nil, fmt.Errorf("tpm: software TPM: %w", err)
	}
	block, _ := pem.Decode(text)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, errors.New("tpm: software TPM: the authority's certificate is not PEM")
	}
	return block.Bytes, nil
}

func findTools() (setup string, err error) {
	if _, err := exec.LookPath("swtpm"); err != nil {
		return "", fmt.Errorf("tpm: %w", ErrNoSoftTPM)
	}
	if setup, err = exec.LookPath("swtpm_setup"); err != nil {
		return "", fmt.Errorf("tpm: %w", ErrNoSoftTPM)
	}
	return setup, nil
}

// writeSetupConfig points swtpm_setup at a certificate authority inside dir,
// so that no privilege and no state outside dir is needed.
func writeSetupConfig(dir string) (string, error) {
	ca := filepath.Join(dir, "ca")
	if err := os.MkdirAll(ca, 0o700); err != nil {
		return "", err
	}
	files := []struct{ name, text string }{
		{"setup.conf", fmt.Sprintf("create_certs_tool = swtpm_localca\ncreate_certs_tool_config = %s\ncreate_certs_tool_options = %s\nactive_pcr_banks = sha256,sha384\n",
			filepath.Join(ca, "localca.conf"), filepath.Join(ca, "localca.options"))},
		{"localca.conf", fmt.Sprintf("statedir = %s\nsigningkey = %s\nissuercert = %s\ncertserial = %s\n",
			ca, filepath.Join(ca, "signkey.pem"), filepath.Join(ca, "issuercert.pem"), filepath.Join(ca, "certserial"))},
		{"localca.options", "--platform-manufacturer conclave\n--platform-version 1\n--platform-model development\n"},
	}
	for _, f := range files {
		if err := os.WriteFile(filepath.Join(ca, f.name), []byte(f.text), 0o600); err != nil {
			return "", err
		}
	}
	return filepath.Join(ca, files[0].name), nil
}

// StartSoftTPM starts the software TPM that SetupSoftTPM made in dir and waits
// until it accepts connections or ctx ends. The process dies with this one. The
// socket is dir/swtpm.sock, or in a new temporary directory when that path is
// too long for a Unix socket. The TPM's log is dir/swtpm.log, of bounded length.
func StartSoftTPM(ctx context.Context, dir string) (*SoftTPM, error) {
	if _, err := findTools(); err != nil {
		return nil, err
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("tpm: software TPM: %w", err)
	}
	if _, err := os.Stat(filepath.Join(dir, softState)); err != nil {
		return nil, fmt.Errorf("tpm: no software TPM in %s: set it up first: %w", dir, err)
	}
	s := &SoftTPM{Socket: filepath.Join(dir, softSocket), done: make(chan struct{})}
	if len(s.Socket) > maxSocketPath {
		if s.ownDir, err = os.MkdirTemp("", "swtpm"); err != nil {
			return nil, fmt.Errorf("tpm: software TPM: %w", err)
		}
		s.Socket = filepath.Join(s.ownDir, softSocket)
	}
	_ = os.Remove(s.Socket) // of a killed predecessor
	if err := s.start(dir); err != nil {
		s.removeOwnDir()
		return nil, err
	}
	if err := s.waitReady(ctx); err != nil {
		_ = s.Stop()
		return nil, err
	}
	return s, nil
}

// start runs swtpm. The parent-death signal is tied to the thread that forks,
// so that thread belongs to the process until it ends.
func (s *SoftTPM) start(dir string) error {
	logFile, err := os.OpenFile(filepath.Join(dir, softLog), os.O_WRONLY|os.O_CREATE|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("tpm: software TPM: %w", err)
	}
	cmd := exec.Command("swtpm", "socket", "--tpm2",
		"--tpmstate", "dir="+dir+",mode=0600",
		"--server", "type=unixio,mode=0600,path="+s.Socket,
		"--flags", "not-need-init,startup-clear")
	cmd.Stdout, cmd.Stderr = logFile, logFile
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM, Setpgid: true}
	started := make(chan error)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		s.err = cmd.Wait()
		close(s.done)
	}()
	if err := <-started; err != nil {
		logFile.Close()
		return fmt.Errorf("tpm: swtpm: %w", err)
	}
	go s.boundLog(logFile)
	s.Pid = cmd.Process.Pid
	return nil
}

// boundLog empties the log when it has grown too long, until the process ends.
func (s *SoftTPM) boundLog(f *os.File) {
	defer f.Close()
	tick := time.NewTicker(softLogCheck)
	defer tick.Stop()
	for {
		select {
		case <-s.done:
			return
		case <-tick.C:
			if fi, err := f.Stat(); err == nil && fi.Size() > softLogMax {
				_ = f.Truncate(0)
			}
		}
	}
}

// waitReady polls until the socket accepts.
func (s *SoftTPM) waitReady(ctx context.Context) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		conn, err := net.Dial("unix", s.Socket)
		if err == nil {
			conn.Close()
			return nil
		}
		select {
		case <-s.done:
			return fmt.Errorf("tpm: swtpm ended at once (%v): see %s beside its state", s.err, softLog)
		case <-ctx.Done():
			return fmt.Errorf("tpm: swtpm does not accept connections: %w", ctx.Err())
		case <-tick.C:
		}
	}
}

// Done is closed when the process has ended, for whatever reason.
func (s *SoftTPM) Done() <-chan struct{} { return s.done }

// Stop ends the process and removes its socket; the state stays. It may be
// called more than once.
func (s *SoftTPM) Stop() error {
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		select {
		case <-s.done:
		default:
			_ = syscall.Kill(s.Pid, sig)
		}
		if s.ended(softStopGrace) {
			_ = os.Remove(s.Socket)
			s.removeOwnDir()
			return nil
		}
	}
	return fmt.Errorf("tpm: swtpm (process %d) does not end", s.Pid)
}

func (s *SoftTPM) ended(within time.Duration) bool {
	timer := time.NewTimer(within)
	defer timer.Stop()
	select {
	case <-s.done:
		return true
	case <-timer.C:
		return false
	}
}

func (s *SoftTPM) removeOwnDir() {
	if s.ownDir != "" {
		_ = os.RemoveAll(s.ownDir)
	}
}

// lastLines keeps the end of a tool's output for an error.
func lastLines(b []byte) []byte {
	b = bytes.TrimSpace(b)
	if len(b) > 500 {
		b = b[len(b)-500:]
	}
	return b
}
