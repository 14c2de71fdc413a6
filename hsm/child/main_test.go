package child_test

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/conclave-kms/conclave/hsm"
	"github.com/conclave-kms/conclave/hsm/child"
	"github.com/conclave-kms/conclave/hsm/hsmtest"
	"github.com/conclave-kms/conclave/kms/secret"
)

const (
	childArgument  = "hsm-child"
	parentArgument = "parent"
)

// parent is a node that opens a device, says which process it is in, and lives until
// it is killed.
func parent(cfg hsm.Config) {
	d, err := openChild(cfg)
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(d.PID())
	select {}
}

// TestMain makes the test program its own child process.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == childArgument {
		if err := child.Main(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	if len(os.Args) == 5 && os.Args[1] == parentArgument {
		parent(hsm.Config{URI: os.Args[2], PINFile: os.Args[3], SoftHSMConf: os.Args[4]})
	}
	goleak.VerifyTestMain(m)
}

// logged is a log that tests read.
type logged struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logged) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *logged) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func newLog(l *logged) *slog.Logger { return slog.New(slog.NewTextHandler(l, nil)) }

// inChild is the configuration of cfg in a child process.
func inChild(cfg hsm.Config) (child.Config, *logged) {
	log := &logged{}
	return child.Config{Command: []string{os.Args[0], childArgument}, HSM: cfg, Log: newLog(log)}, log
}

// open opens cfg in a child process and closes it with the test.
func open(t testing.TB, cfg hsm.Config) (*child.Device, *logged) {
	t.Helper()
	c, log := inChild(cfg)
	d, err := child.Open(context.Background(), c)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d, log
}

// provisioned makes a token with device keys on P-256, where SoftHSM is quickest.
func provisioned(t testing.TB) (*hsmtest.Token, hsm.Config) {
	t.Helper()
	tok := hsmtest.New(t)
	tok.Provision(t, tok.Config())
	return tok, tok.Config()
}

// eventually waits for f, which is about another process.
func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %v", what, err)
		}
		time.Sleep(5 * time.Millisecond) // polls another process, no synchronisation
	}
}

// hmacKey wraps a random key for the device and returns a check of closures.
func hmacKey(t testing.TB, d *child.Device) (blob []byte, check func(mac func(context.Context, []byte) ([]byte, error)) error) {
	t.Helper()
	key, err := secret.New(hsm.HMACKey)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(key.Destroy)
	_, _ = rand.Read(key.Reveal()) // crypto/rand.Read never returns an error
	_, public := d.ImportKey()
	if blob, err = hsm.WrapHMAC(public, key, nil); err != nil {
		t.Fatal(err)
	}
	return blob, func(mac func(context.Context, []byte) ([]byte, error)) error {
		got, err := mac(context.Background(), []byte("message"))
		if err != nil {
			return err
		}
		want := hmac.New(sha256.New, key.Reveal())
		_, _ = want.Write([]byte("message"))
		if !hmac.Equal(got, want.Sum(nil)) {
			return fmt.Errorf("the MAC differs from Go's")
		}
		return nil
	}
}

func openChild(cfg hsm.Config) (*child.Device, error) {
	c, _ := inChild(cfg)
	return child.Open(context.Background(), c)
}
