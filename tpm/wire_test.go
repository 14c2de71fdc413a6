package tpm_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"github.com/conclave-kms/conclave/tpm"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

// wire stands on the bus between a device and its software TPM: it records
// what passes and may change the answers.
type wire struct {
	mu     sync.Mutex
	seen   bytes.Buffer
	tamper func(rsp []byte) []byte
	refuse func(cmd []byte) []byte // an answer in place of the TPM's, or nil; empty cuts the connection
}

// tap returns a wire and the configuration that goes through it.
func tap(t *testing.T, cfg tpm.Config) (*wire, tpm.Config) {
	t.Helper()
	dir, err := os.MkdirTemp("", "tap")
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	w := &wire{}
	var wg sync.WaitGroup
	target := strings.TrimPrefix(cfg.Path, "unix:")
	wg.Go(func() {
		for {
			near, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() { w.serve(near, target) })
		}
	})
	t.Cleanup(func() { ln.Close(); wg.Wait(); os.RemoveAll(dir) })
	cfg.Path = "unix:" + ln.Addr().String()
	return w, cfg
}

func (w *wire) serve(near net.Conn, target string) {
	defer near.Close()
	far, err := net.Dial("unix", target)
	if err != nil {
		return
	}
	defer far.Close()
	for {
		cmd, err := frame(near)
		if err != nil {
			return
		}
		w.mu.Lock()
		var refusal []byte
		if w.refuse != nil {
			refusal = w.refuse(cmd)
		}
		w.mu.Unlock()
		if refusal != nil {
			if len(refusal) == 0 { // cut
				return
			}
			if _, err := near.Write(refusal); err != nil {
				return
			}
			continue
		}
		if _, err := far.Write(cmd); err != nil {
			return
		}
		rsp, err := frame(far)
		if err != nil {
			return
		}
		w.mu.Lock()
		w.seen.Write(cmd)
		w.seen.Write(rsp)
		if w.tamper != nil {
			rsp = w.tamper(rsp)
		}
		w.mu.Unlock()
		if _, err := near.Write(rsp); err != nil {
			return
		}
	}
}

// frame reads one command or response.
func frame(r io.Reader) ([]byte, error) {
	hdr := make([]byte, 10)
	if _, err := io.ReadFull(r, hdr); err != nil {
		return nil, err
	}
	b := make([]byte, binary.BigEndian.Uint32(hdr[2:]))
	copy(b, hdr)
	_, err := io.ReadFull(r, b[10:])
	return b, err
}

func (w *wire) setTamper(f func([]byte) []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.tamper = f
}

func (w *wire) setRefuse(f func([]byte) []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.refuse = f
}

func (w *wire) shows(b []byte) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return bytes.Contains(w.seen.Bytes(), b)
}

// TestNothingInClear: whoever reads the bus from provisioning on learns neither
// authorization values nor keys, shared secrets, digests or random bytes.
func TestNothingInClear(t *testing.T) {
	p := tpmtest.New(t)
	w, cfg := tap(t, p.Config())
	d := p.Open(cfg)
	ctx := t.Context()
	eph, z := ephemeral(t, d, false)
	if _, err := d.ECDH(ctx, eph.PublicKey()); err != nil {
		t.Fatal(err)
	}
	key, digest, random := []byte("0123456789abcdef key material"), bytes.Repeat([]byte("digest"), 8), make([]byte, 64)
	blob := mustWrap(t, d, []byte("aad"), key)
	got, err := d.Unwrap(ctx, []byte("aad"), blob)
	if err != nil {
		t.Fatal(err)
	}
	defer got.Destroy()
	if _, err := d.Sign(ctx, digest); err != nil {
		t.Fatal(err)
	}
	if err := d.Random(ctx, random); err != nil {
		t.Fatal(err)
	}
	if !w.shows(blob[len(blob)-40:]) {
		t.Fatal("the wire records nothing")
	}
	owner, lockout, keyAuth := tpm.AuthValues(d)
	defer owner.Destroy()
	defer lockout.Destroy()
	defer keyAuth.Destroy()
	for name, b := range map[string][]byte{
		"owner authorization": owner.Reveal(), "lockout authorization": lockout.Reveal(), "key authorization": keyAuth.Reveal(),
		"shared secret": z, "peer's point": eph.PublicKey().Bytes()[1:49], "wrapped key": key, "digest": digest, "random bytes": random,
	} {
		if w.shows(b) {
			t.Errorf("the bus shows the %s", name)
		}
	}
}

// TestTampering: with any bit of any answer changed, a call fails or its result
// is right, nothing is left in the TPM, and it works again afterwards.
func TestTampering(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	w, cfg := tap(t, p.Config())
	d := p.Open(cfg)
	n, failed := 0, 0
	w.setTamper(func(rsp []byte) []byte {
		n++
		if n%4 != 0 {
			return rsp
		}
		rsp = bytes.Clone(rsp)
		bit := 48 + (n*131)%(8*len(rsp)-48) // the length stays
		rsp[bit/8] ^= 1 << (bit % 8)
		return rsp
	})
	for range 60 {
		eph, z := ephemeral(t, d, false)
		if got, err := d.ECDH(t.Context(), eph.PublicKey()); err != nil {
			failed++
		} else if !bytes.Equal(got, z) {
			t.Fatal("a wrong shared secret was returned")
		}
		if err := everything(t.Context(), d); err != nil {
			failed++
		}
	}
	w.setTamper(nil)
	if failed < 60 {
		t.Errorf("only %d of 120 calls failed", failed)
	}
	eventually(t, func() error { return everything(t.Context(), d) })
	if n := dictionaryAttacks(t, p.Config()); n != 0 {
		t.Errorf("tampering counted as %d dictionary attacks", n)
	}
	if n := loaded(t, p.Config()); n != 0 {
		t.Errorf("%d transient objects and sessions are left", n)
	}
}

// TestStartupNeeded: a TPM that was reset and not started up is started up, and
// the call that met it is repeated.
func TestStartupNeeded(t *testing.T) {
	p := tpmtest.New(t)
	w, cfg := tap(t, p.Config())
	d := p.Open(cfg)
	blob := mustWrap(t, d, nil, []byte("key"))
	for name, op := range map[string]func() error{
		"wrap":   func() error { _, err := d.Wrap(context.Background(), nil, []byte("key")); return err },
		"unwrap": func() error { k, err := d.Unwrap(context.Background(), nil, blob); k.Destroy(); return err },
	} {
		injected := 0
		w.setTamper(func(rsp []byte) []byte {
			if injected++; injected == 1 {
				return []byte{0x80, 1, 0, 0, 0, 10, 0, 0, 1, 0} // TPM_RC_INITIALIZE
			}
			return rsp
		})
		if err := op(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if injected < 5 {
			t.Errorf("%s: only %d answers", name, injected)
		}
	}
}

// TestFailureMode: a TPM whose self-test failed is unavailable.
func TestFailureMode(t *testing.T) {
	p := tpmtest.New(t)
	w, cfg := tap(t, p.Config())
	d := p.Open(cfg)
	w.setTamper(func([]byte) []byte { return []byte{0x80, 1, 0, 0, 0, 10, 0, 0, 1, 1} }) // TPM_RC_FAILURE
	for range 2 {
		if err := d.Check(t.Context()); !errors.Is(err, tpm.ErrUnavailable) || !errors.Is(err, tpm2.TPMRCFailure) {
			t.Errorf("failure mode: %v, want ErrUnavailable", err)
		}
	}
	w.setTamper(nil)
	if err := everything(t.Context(), d); err != nil {
		t.Errorf("afterwards: %v", err)
	}
}
