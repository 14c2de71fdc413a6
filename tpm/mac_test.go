package tpm_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/tpm"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

func longMessage(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{1}).Read(b)
	return b
}

// TestLongOnTheBus: neither a long message nor its HMAC passes in the clear.
func TestLongOnTheBus(t *testing.T) {
	p := tpmtest.New(t)
	w, cfg := tap(t, p.Config())
	d := p.Open(cfg)
	key, mac, _ := loadHMAC(t, d)
	msg := longMessage(5000)
	checkHMAC(t, mac, key, msg)
	for at := 0; at+16 < len(msg); at += 16 {
		if w.shows(msg[at : at+16]) {
			t.Fatalf("the bus shows the message at %d", at)
		}
	}
	if w.shows(softHMAC(key, msg)) {
		t.Error("the bus shows the HMAC")
	}
}

// TestLongRefused: whichever command of a sequence the TPM refuses, or answers
// with a bit changed, the sequence does not stay in the TPM, and the key works on.
func TestLongRefused(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	w, cfg := tap(t, p.Config())
	d := p.Open(cfg)
	key, mac, unload := loadHMAC(t, d)
	msg := longMessage(3000)
	count := 0
	w.setTamper(func(rsp []byte) []byte { count++; return rsp })
	checkHMAC(t, mac, key, msg)
	whole := count
	w.setTamper(nil)
	answer := func(rc ...byte) func([]byte) []byte {
		return func([]byte) []byte { return append([]byte{0x80, 1, 0, 0, 0, 10}, rc...) }
	}
	for name, c := range map[string]struct {
		set    func(func([]byte) []byte)
		change func([]byte) []byte
		pass   func([]byte) []byte
	}{
		"TPM_RC_FAILURE": {w.setRefuse, answer(0, 0, 1, 1), func([]byte) []byte { return nil }},
		"TPM_RC_VALUE":   {w.setRefuse, answer(0, 0, 0, 0x84), func([]byte) []byte { return nil }},
		"a changed bit":  {w.setTamper, func(rsp []byte) []byte { rsp[len(rsp)-1] ^= 1; return rsp }, func(rsp []byte) []byte { return rsp }},
	} {
		failed := 0
		for at := range whole {
			n := 0
			c.set(func(b []byte) []byte {
				if n++; n == at+1 {
					return c.change(bytes.Clone(b))
				}
				return c.pass(b)
			})
			if got, err := mac(t.Context(), msg); err != nil {
				failed++
			} else if !bytes.Equal(got, softHMAC(key, msg)) {
				t.Fatalf("%s at command %d: a wrong HMAC", name, at)
			}
			c.set(nil)
			checkHMAC(t, mac, key, msg)
			if n := loaded(t, p.Config()); n != 2 {
				t.Fatalf("%s at command %d: %d objects and sessions in the TPM, want the key and its session", name, at, n)
			}
		}
		if name != "TPM_RC_VALUE" && failed == 0 {
			t.Errorf("%s: no call failed", name)
		}
	}
	unload()
	if n := loaded(t, p.Config()); n != 0 {
		t.Errorf("%d transient objects and sessions are left", n)
	}
}

// TestLongInterrupted: a caller that gives up, and a TPM that dies, in the middle
// of sequences.
func TestLongInterrupted(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	d := p.Open(p.Config())
	key, mac, unload := loadHMAC(t, d)
	msg := longMessage(tpm.MaxMessage)
	for i := range 10 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i)*2*time.Millisecond)
		if got, err := mac(ctx, msg); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("cancelled HMAC: %v", err)
		} else if err == nil && !bytes.Equal(got, softHMAC(key, msg)) {
			t.Error("a wrong HMAC")
		}
		cancel()
	}
	var wg sync.WaitGroup
	started := make(chan struct{})
	wg.Go(func() {
		close(started)
		if got, err := mac(context.Background(), msg); err == nil && !bytes.Equal(got, softHMAC(key, msg)) {
			t.Error("a wrong HMAC")
		} else if err != nil && !errors.Is(err, tpm.ErrUnavailable) {
			t.Errorf("a TPM that dies: %v, want ErrUnavailable", err)
		}
	})
	<-started
	p.Restart()
	wg.Wait()
	eventually(t, func() error { _, err := mac(t.Context(), msg); return err })
	checkHMAC(t, mac, key, msg)
	unload()
	if n := loaded(t, p.Config()); n != 0 {
		t.Errorf("%d transient objects and sessions are left", n)
	}
}

// TestLongConcurrent: sequences beside all else on a TPM with three slots.
func TestLongConcurrent(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	cfg := p.Config()
	cfg.CallTimeout = time.Minute
	d := p.Open(cfg)
	key, mac, unload := loadHMAC(t, d)
	key2, mac2, unload2 := loadHMAC(t, d)
	var wg sync.WaitGroup
	for g := range 12 {
		wg.Go(func() {
			msg := binary.BigEndian.AppendUint32(longMessage(2000+300*g), uint32(g))
			switch g % 3 {
			case 0:
				checkHMAC(t, mac, key, msg)
			case 1:
				checkHMAC(t, mac2, key2, msg)
			default:
				if err := everything(context.Background(), d); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	unload()
	unload2()
	if n := loaded(t, p.Config()); n != 0 {
		t.Errorf("%d transient objects and sessions are left", n)
	}
}
