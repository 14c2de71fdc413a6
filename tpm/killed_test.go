package tpm_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/kms/secret"
	"github.com/conclave-kms/conclave/tpm"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

// runNode is the child process of TestNodeKilled.
func runNode(config string) error {
	path, auth, _ := strings.Cut(config, "\n")
	ctx, cfg := context.Background(), tpm.Config{Path: path, AuthFile: auth, PCRs: []int{7}}
	if err := tpm.Provision(ctx, cfg); err != nil && !errors.Is(err, tpm.ErrProvisioned) {
		return err
	}
	d, err := tpm.Open(ctx, cfg)
	if err != nil {
		return err
	}
	_, public := d.ImportKey()
	key, err := secret.Copy(make([]byte, 32))
	if err != nil {
		return err
	}
	blob, err := tpm.WrapHMAC(public, key, nil)
	if err != nil {
		return err
	}
	mac, _, err := d.LoadHMAC(ctx, blob)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	for {
		if _, err := mac(ctx, make([]byte, 5000)); err != nil {
			return err
		}
		if err := everything(ctx, d); err != nil {
			return err
		}
		ev, err := d.Attest(ctx, []byte("q"))
		if err != nil {
			return err
		}
		ak, err := tpm2.Unmarshal[tpm2.TPMTPublic](ev.AK)
		if err != nil {
			return err
		}
		name, err := tpm2.ObjectName(ak)
		if err != nil {
			return err
		}
		credential, encrypted, err := tpm.MakeCredential(ev.EKPublic, name.Buffer, []byte("secret"))
		if err != nil {
			return err
		}
		if _, err := d.Activate(ctx, credential, encrypted); err != nil {
			return err
		}
	}
}

// startNode starts a node that does its work on the wire, and waits until it does.
func startNode(t *testing.T, cfg tpm.Config) *exec.Cmd {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), nodeConfig+"="+cfg.Path+"\n"+cfg.AuthFile)
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		t.Fatalf("the node says %q, %v", line, err)
	}
	return cmd
}

// TestNodeKilled: kill -9 of a node that works on the TPM, which therefore never
// says TPM2_Shutdown, and then of the TPM too: the next node opens, finds the
// same keys and no leftovers, and no dictionary attack is counted.
func TestNodeKilled(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	w, wired := tap(t, p.Config())
	cfg := p.Config()
	cfg.PCRs = []int{7}
	var first *tpm.Device
	for round, commands := range []int{1, 4, 11, 19, 64, 120, 131} {
		cmd := startNode(t, wired)
		reached, n := make(chan struct{}), 0
		w.setRefuse(func([]byte) []byte {
			if n++; n == commands {
				close(reached)
			}
			return nil
		})
		<-reached
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait()
		w.setRefuse(nil)
		if round%2 == 1 {
			p.Restart()
		}
		d, err := tpm.Open(t.Context(), cfg)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if err := everything(t.Context(), d); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		if first == nil {
			first = d
		} else if !first.SigningKey().Equal(d.SigningKey()) {
			t.Fatal("another signing key")
		}
		if n := loaded(t, cfg); n != 0 {
			t.Errorf("round %d: %d transient objects and sessions are left", round, n)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if n := dictionaryAttacks(t, cfg); n != 0 {
			t.Errorf("round %d: %d dictionary attacks counted", round, n)
		}
	}
}

// cutAfter runs a step with the connection, and the power of the TPM, cut after so
// many commands. It reports whether the step was through before.
func cutAfter(t *testing.T, p *tpmtest.TPM, w *wire, commands int, step func() error) (through bool) {
	t.Helper()
	n := 0
	w.setRefuse(func([]byte) []byte {
		if n++; n > commands {
			return []byte{}
		}
		return nil
	})
	err := step()
	w.setRefuse(nil)
	if err != nil && !errors.Is(err, tpm.ErrUnavailable) {
		t.Fatalf("cut after %d commands: %v", commands, err)
	}
	p.Restart()
	return err == nil
}

// TestProvisionCut: wherever Provision was cut off by a power cut, running it
// again makes a whole set of keys.
func TestProvisionCut(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	w, cfg := tap(t, p.Config())
	cfg.PCRs = []int{7}
	for commands := 0; ; commands += 5 { // every one takes minutes
		through := cutAfter(t, p, w, commands, func() error { return tpm.Provision(t.Context(), cfg) })
		if err := tpm.Provision(t.Context(), cfg); err != nil && !errors.Is(err, tpm.ErrProvisioned) {
			t.Fatalf("after a cut at command %d: %v", commands, err)
		}
		d, err := tpm.Open(t.Context(), cfg)
		if err != nil {
			t.Fatalf("after a cut at command %d: %v", commands, err)
		}
		if _, err := d.Attest(t.Context(), []byte("q")); err != nil {
			t.Fatalf("after a cut at command %d: %v", commands, err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if through {
			if commands < 20 {
				t.Errorf("Provision needs only %d commands", commands)
			}
			break
		}
		direct(t, cfg, tpm2.Clear{AuthHandle: tpm2.AuthHandle{Handle: tpm2.TPMRHPlatform, Auth: tpm2.PasswordAuth(nil)}})
	}
	if n := dictionaryAttacks(t, p.Config()); n != 0 {
		t.Errorf("%d dictionary attacks counted", n)
	}
}

// TestApprovalCut: wherever the approval of register values was cut off, running
// it again completes it, and the keys are the same.
func TestApprovalCut(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	w, cfg := tap(t, p.Config())
	cfg.PCRs = []int{7}
	d := p.Open(cfg)
	pub := d.SigningKey()
	for commands := 0; ; commands += 3 {
		through := cutAfter(t, p, w, commands, func() error {
			measure(t, p.Config(), 7, fmt.Sprint(commands))
			return tpm.UpdatePCRPolicy(t.Context(), cfg)
		})
		if through {
			break
		}
		measure(t, cfg, 7, "another boot")
		update(t, cfg)
		usable(t, d)
		p.Restart()
	}
	update(t, cfg)
	if again := p.Open(cfg); !again.SigningKey().Equal(pub) {
		t.Error("another signing key")
	}
}
