package harness

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/conclave-kms/conclave/tpm"
)

// SoftTPM is the software TPM of jp's node in the hands of a test.
type SoftTPM struct {
	Process
	Dir string // its state

	c *Cluster
}

// SoftTPM finds the process of the cluster's software TPM, or the one that a test
// has killed last.
func (c *Cluster) SoftTPM() (*SoftTPM, error) {
	s := &SoftTPM{c: c, Dir: filepath.Join(c.Dir, "jp", "swtpm")}
	found, err := Processes("the software TPM", func(_ int, command string) bool {
		program, _, _ := strings.Cut(command, " ")
		return filepath.Base(program) == "swtpm" && strings.Contains(command, "dir="+s.Dir+",")
	})
	if err != nil {
		return nil, err
	}
	if len(found) > 1 {
		return nil, fmt.Errorf("%d processes of swtpm use %s", len(found), s.Dir)
	}
	s.Process = Process{Name: "the software TPM"}
	if len(found) == 1 {
		s.Process = found[0]
	}
	return s, nil
}

// Kill ends the software TPM as a power cut would.
func (s *SoftTPM) Kill(ctx context.Context) error {
	if s.PID == 0 {
		return errors.New("the software TPM does not run")
	}
	return s.Process.Kill(ctx)
}

// Start starts a software TPM that was killed, on its state and its socket. It
// ends with the cluster.
func (s *SoftTPM) Start(ctx context.Context) error {
	if s.PID != 0 && s.Running() {
		return fmt.Errorf("the software TPM runs already (process %d)", s.PID)
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	soft, err := tpm.StartSoftTPM(ctx, s.Dir)
	if err != nil {
		return err
	}
	s.PID = soft.Pid
	s.c.mu.Lock()
	s.c.after = append(s.c.after, soft.Stop)
	s.c.mu.Unlock()
	return nil
}
