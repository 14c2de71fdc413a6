package tpm_test

import (
	"bytes"
	"context"
	"crypto/elliptic"
	"errors"
	"testing"
	"time"

	"github.com/conclave-kms/conclave/tpm"
	"github.com/conclave-kms/conclave/tpm/tpmtest"
)

// TestImportedRestart: keys survive restarts of the TPM, noticed or not, and
// objects that others put in their place.
func TestImportedRestart(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	d := p.Open(p.Config())
	key, mac, unload := loadHMAC(t, d)
	pub, sign, _ := loadSigner(t, d, elliptic.P256())
	for range 2 {
		checkHMAC(t, mac, key, []byte("before"))
		p.Restart()
		checkHMAC(t, mac, key, []byte("after"))
		checkSignature(t, sign, pub)
		p.Kill()
		if _, err := mac(t.Context(), nil); !errors.Is(err, tpm.ErrUnavailable) {
			t.Errorf("dead TPM: %v, want ErrUnavailable", err)
		}
		p.Restart()
		checkSignature(t, sign, pub)
	}
	// Another object takes the handle of the kept key.
	p.Restart()
	other := p.Open(p.Config())
	otherKey, otherMAC, _ := loadHMAC(t, other)
	checkHMAC(t, otherMAC, otherKey, []byte("foreign"))
	checkSignature(t, sign, pub)
	checkHMAC(t, otherMAC, otherKey, []byte("foreign"))
	checkHMAC(t, mac, key, []byte("ours"))
	p.Kill()
	unload() // of a dead TPM neither hangs nor fails
	p.Restart()
	if _, err := mac(t.Context(), nil); !errors.Is(err, tpm.ErrInvalid) {
		t.Errorf("after unload: %v, want ErrInvalid", err)
	}
	if err := everything(t.Context(), d); err != nil {
		t.Error(err)
	}
}

// TestImportedRefusedOnce: whatever a TPM says against a kept key or its session
// once, the call loads the key again and goes on.
func TestImportedRefusedOnce(t *testing.T) {
	p := tpmtest.New(t)
	w, cfg := tap(t, p.Config())
	d := p.Open(cfg)
	key, mac, unload := loadHMAC(t, d)
	for name, rc := range map[string][]byte{
		"TPM_RC_INITIALIZE": {0, 0, 1, 0}, "TPM_RC_REFERENCE_H0": {0, 0, 9, 0x10},
		"TPM_RC_REFERENCE_S0": {0, 0, 9, 0x18}, "TPM_RC_AUTH_FAIL of session 1": {0, 0, 9, 0x8e},
	} {
		checkHMAC(t, mac, key, []byte("loads it"))
		injected := 0
		w.setTamper(func(rsp []byte) []byte {
			if injected++; injected == 1 {
				return append([]byte{0x80, 1, 0, 0, 0, 10}, rc...)
			}
			return rsp
		})
		checkHMAC(t, mac, key, []byte("refused once"))
		if injected < 5 {
			t.Errorf("%s: only %d answers", name, injected)
		}
		w.setTamper(nil)
	}
	unload()
	if n := loaded(t, p.Config()); n != 0 {
		t.Errorf("%d transient objects and sessions are left", n)
	}
}

// TestImportedTampering: with any bit of an answer changed the import or the
// HMAC fails, or the HMAC is right, and nothing is left in the TPM.
func TestImportedTampering(t *testing.T) {
	t.Parallel()
	p := tpmtest.New(t)
	w, cfg := tap(t, p.Config())
	d := p.Open(cfg)
	key := bytes.Repeat([]byte{9}, 32)
	blob, msg := hmacBlob(t, d, key), []byte("message")
	n, failed := 0, 0
	w.setTamper(func(rsp []byte) []byte {
		if n++; n%5 != 0 {
			return rsp
		}
		rsp = bytes.Clone(rsp)
		bit := 48 + (n*131)%(8*len(rsp)-48) // the length stays
		rsp[bit/8] ^= 1 << (bit % 8)
		return rsp
	})
	for range 40 {
		mac, unload, err := d.LoadHMAC(t.Context(), blob)
		if err != nil {
			failed++
			continue
		}
		for range 3 {
			if got, err := mac(t.Context(), msg); err != nil {
				failed++
			} else if !bytes.Equal(got, softHMAC(key, msg)) {
				t.Fatal("a wrong HMAC was returned")
			}
		}
		unload()
	}
	w.setTamper(nil)
	if failed < 20 {
		t.Errorf("only %d calls failed", failed)
	}
	mac, unload, err := d.LoadHMAC(t.Context(), blob)
	if err != nil {
		t.Fatal(err)
	}
	checkHMAC(t, mac, key, msg)
	unload()
	if n := loaded(t, p.Config()); n != 0 {
		t.Errorf("%d transient objects and sessions are left", n)
	}
}

// TestImportedCancelled: callers that give up neither break the key nor leave
// anything in the TPM.
func TestImportedCancelled(t *testing.T) {
	p := tpmtest.New(t)
	d := p.Open(p.Config())
	key, mac, unload := loadHMAC(t, d)
	blob := hmacBlob(t, d, key)
	for i := range 40 {
		ctx, cancel := context.WithTimeout(context.Background(), time.Duration(i)*200*time.Microsecond)
		if _, err := mac(ctx, nil); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("cancelled HMAC: %v", err)
		}
		if _, _, err := d.LoadHMAC(ctx, blob); err != nil && !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("cancelled load: %v", err)
		}
		cancel()
	}
	checkHMAC(t, mac, key, []byte("afterwards"))
	unload()
	if n := loaded(t, p.Config()); n != 0 {
		t.Errorf("%d transient objects and sessions are left", n)
	}
}
